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
from helpers.harness import run_distributed
from helpers.small_model import write_model

from megatron_ext import accelerator
from pangu.inference.generation import TextGenerator
from pangu.text.tokenizer import MODEL_FILE, PanguTokenizer
from pangu.text.tokenizer_training import train_tokenizer

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


def run(*arguments: str | int | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program, run in this process."""
    from pangu.generate import main

    out, err, argv, original = io.StringIO(), io.StringIO(), sys.argv, sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    sys.argv = ["pangu.generate", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv, sys.stdin = argv, original
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


FILE = '四川的天气，\r\n\n"北京\\n"\n""\n'.encode()
FILE_PROMPTS = ["四川的天气，", "北京\n", ""]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_file_of_prompts(weights: Path, tmp_path: Path, batch_size: int) -> None:
    """However they are batched, and from standard input too."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + FILE)  # some editors begin with that
    options = ("--model", weights, "--json", "--temperature", 0, "--batch-size", batch_size, "--num-samples", 2, "--prompt-file")
    from_file = run(*options, tmp_path / "prompts.txt")
    assert from_file == run(*options, "-", stdin=FILE)
    assert from_file[0] == 0
    expected = TextGenerator.from_directory(weights).generate(FILE_PROMPTS, temperature=0, num_samples=2)
    assert [(one["prompt"], one["ids"]) for one in map(json.loads, from_file[1].splitlines())] == [
        (FILE_PROMPTS[number // 2], generation.ids) for number, generation in enumerate(expected)
    ]


def test_every_option_reaches_the_generator(weights: Path) -> None:
    options = {"top_k": 30, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    options |= {"max_new_tokens": 9, "seed": 4, "num_samples": 3}
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    prompt = "四川的天气很好。" * 9
    code, out, err = run(
        "--model", weights, "--prompt", prompt, "--json", "--logprobs", "--truncate-prompt", *words, "--stop-id", 7, "--stop", "。"
    )
    assert code == 0, err
    expected = TextGenerator.from_directory(weights).generate([prompt], truncate_prompts=True, stop=["。"], stop_ids=[7], **options)
    for line, generation in zip(out.splitlines(), expected, strict=True):
        assert json.loads(line) == {"prompt": prompt, **vars(generation)}
    assert all(len(generation.logprobs) == len(generation.ids) for generation in expected)
    assert "。" not in "".join(generation.text for generation in expected)


def test_interactive_continues_each_line_and_survives_bad_ones(weights: Path) -> None:
    lines = f"{PROMPTS[0]}\n\n{'北京' * 30}\n{PROMPTS[1]}\n".encode()
    code, out, err = run("--model", weights, "--interactive", "--temperature", 0, stdin=lines)
    expected = [
        generation.text for prompt in PROMPTS for generation in TextGenerator.from_directory(weights).generate([prompt], temperature=0)
    ]
    assert code == 0
    assert out == f"{expected[0]}\n\n{expected[1]}\n"
    assert err.count("error: ") == 1 and "Shorten the prompt" in err


def test_8_bit_weights(weights: Path) -> None:
    code, out, _ = run("--model", weights, "--prompt", PROMPTS[0], "--temperature", 0, "--int8")
    [expected] = TextGenerator.from_directory(weights, int8=True).generate(PROMPTS[:1], temperature=0)
    assert (code, out) == (0, expected.text + "\n")


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


def interactive_rank(weights: Path) -> tuple[int, str, str]:
    """Only the first process has something on its standard input."""
    lines = f"{PROMPTS[0]}\n{'北京' * 30}\n{PROMPTS[1]}\n".encode() if os.environ["RANK"] == "0" else b""
    return run("--model", weights, "--interactive", "--seed", 5, stdin=lines)


def test_two_ranks_share_one_standard_input(weights: Path) -> None:
    lines = f"{PROMPTS[0]}\n{'北京' * 30}\n{PROMPTS[1]}\n".encode()
    alone = run("--model", weights, "--interactive", "--seed", 5, stdin=lines)
    first, second = run_distributed(interactive_rank, 2, weights)
    assert first == alone and alone[1].strip()
    assert second == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "北京", "--max-new-tokens", 24], "but the model's window has 24. Set max_new_tokens to "),
        (["--prompt", "北京", "--temperature", -1], "temperature = -1.0; expected 0 (greedy) or more."),
        (["--prompt", "北京" * 30], "Shorten the prompt."),
        (["--prompt", "北京", "--model", "nowhere"], "nowhere"),
        (["--prompt", "北京", "--presence-penalty", "nan"], "presence_penalty = nan"),
        (["--prompt", "北京", "--num-samples", 0], "--num-samples 0: expected 1 or more"),
        (["--prompt", "北京", "--batch-size", 0], "--batch-size 0: expected 1 or more"),
        (["--interactive", "--json"], "leave out --json and --num-samples"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: cannot be read (No such file or directory)"),
        (["--prompt-file", "-"], "standard input: no prompt found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(weights: Path, arguments: list[str | int], message: str) -> None:
    code, out, err = run("--model", weights, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xb1\xb1\xbe\xa9\n", "byte 0 is not UTF-8"), (b'a\n"b\n', "line 2: begins with a double quote and is not a JSON string")],
)
def test_a_bad_file_of_prompts_is_refused(weights: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    for file, stdin in ((tmp_path / "prompts.txt", b""), (Path("-"), content)):
        code, out, err = run("--model", weights, "--prompt-file", file, stdin=stdin)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


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
