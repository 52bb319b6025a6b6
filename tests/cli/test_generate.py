"""python -m pangu.generate: text or JSON on standard output and nothing else, one line for what cannot work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from small_model import write_model

from megatron_ext import accelerator
from pangu.inference.generation import TextGenerator
from pangu.tokenizer import MODEL_FILE, PanguTokenizer
from pangu.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = ["四川的天气，", "北京"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    places, predicates = ["四川", "北京", "上海", "中国"], ["的天气很好", "是一个大城市", "的省会是成都", "欢迎我们"]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"{place}{predicate}。\n" for place in places for predicate in predicates) * 20, "utf-8")
    tokenizer = train_tokenizer([corpus], 39, folder / "tokenizer")
    write_model(folder / "weights", tokenizer.path)
    return folder / "weights"


def run(*arguments: str | int | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program, run in this process."""
    from pangu.generate import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["pangu.generate", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
    return 0, out.getvalue(), err.getvalue()


def test_json_lines(weights: Path) -> None:
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    code, out, _ = run("--model", weights, *prompts, "--max-new-tokens", 9, "--top-k", 5, "--seed", 3, "--json")
    assert code == 0
    objects = [json.loads(line) for line in out.splitlines()]
    expected = TextGenerator.from_directory(weights).generate(PROMPTS, max_new_tokens=9, top_k=5, seed=3)
    assert [(one["prompt"], one["text"], one["ids"], one["finish_reason"]) for one in objects] == [
        (prompt, generation.text, generation.ids, generation.finish_reason) for prompt, generation in zip(PROMPTS, expected, strict=True)
    ]
    tokenizer = PanguTokenizer(weights)
    assert all(one["text"] == tokenizer.decode(one["ids"]) and 0 < len(one["ids"]) <= 9 for one in objects)


def test_standard_output_is_the_text_alone(weights: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("DS_ACCELERATOR")  # DeepSpeed announces what it finds
    command = [sys.executable, "-m", "pangu.generate", "--model", str(weights), "--prompt", PROMPTS[0], "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=90, check=False)
    [expected] = TextGenerator.from_directory(weights).generate(PROMPTS[:1], temperature=0)
    assert (done.returncode, done.stdout) == (0, expected.text + "\n"), done.stderr


def test_two_ranks_print_once_what_one_prints(weights: Path) -> None:
    arguments = ("--model", weights, "--prompt", PROMPTS[0], "--local_rank", 0)
    alone = run(*arguments)
    assert alone[0] == 0 and alone[1].strip()
    assert [result[:2] for result in run_distributed(run, 2, *arguments)] == [alone[:2], (0, "")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "北京", "--max-new-tokens", 24], "but the model's window has 24. Set max_new_tokens to "),
        (["--prompt", "北京", "--temperature", -1], "temperature = -1.0; expected 0 (greedy) or more."),
        (["--prompt", "北京" * 30], "Shorten the prompt."),
        (["--prompt", "北京", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(weights: Path, arguments: list[str | int], message: str) -> None:
    code, out, err = run("--model", weights, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_a_directory_without_a_tokenizer_is_refused(weights: Path, tmp_path: Path) -> None:
    for file in weights.iterdir():
        if file.name != MODEL_FILE:
            (tmp_path / file.name).symlink_to(file)
    code, _, err = run("--model", tmp_path, "--prompt", "北京")
    assert code == 2 and MODEL_FILE in err


@pytest.mark.parametrize(("device", "expected"), [("meta", torch.bfloat16), ("cpu", torch.float32)])
def test_weights_keep_their_dtype_except_on_a_cpu(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: torch.dtype
) -> None:
    write_model(tmp_path / "weights", weights / MODEL_FILE, dtype=torch.bfloat16)
    monkeypatch.setattr(accelerator, "device", lambda: torch.device(device))
    model = TextGenerator.from_directory(tmp_path / "weights").model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.get_default_dtype() == torch.float32


def test_processes_that_do_not_divide_the_heads_are_refused(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = run("--model", weights, "--prompt", "北京")
    assert code == 2 and "3 processes do not divide the 4 attention heads" in err
