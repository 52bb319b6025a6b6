"""tools/benchmark.py: what it prints, what it refuses, and that its numbers are measured."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.result_form import check_form
from helpers.small_model import write_model
from rich.console import Console

from pangu.benchmarks import convert, generate, machine, score, turns
from pangu.config import ModelConfig
from pangu.errors import InputError
from pangu.evaluation.scoring import Span
from pangu.text.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = ["mindspore -> huggingface", "huggingface -> megatron", "megatron -> mindspore"]


def options(workdir: Path) -> argparse.Namespace:
    return argparse.Namespace(preset="350M", layers=1, dtype="fp16", repeats=1, workdir=workdir)


def test_conversions_are_measured_next_to_copies(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/benchmark.py", "convert", "--preset", "350M", "--layers", "1", "--repeats", "1", "--json"]
    done = subprocess.run([*command, "--workdir", tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["task"] == "convert" and "cores" in result["device"]
    assert result["model"]["largest_tensor_bytes"] == 40000 * 1024 * 2 < result["model"]["bytes"]
    check_form(result)
    for step in STEPS:
        ours = {metric: value for name, value in result["ours"].items() for metric, _, way in [name.partition(", ")] if way == step}
        copied = result["peers"]["copy"][f"seconds, {step}"]
        assert result["ratios"]["copy"][f"seconds, {step}"] == copied / ours["seconds"] > 0
        # The table of words is read whole by each of them, and nothing else is of its size.
        assert 1 <= ours["over_baseline_bytes"] / result["model"]["largest_tensor_bytes"] < 1.6
        assert ours["peak_bytes"] - ours["baseline_bytes"] == ours["over_baseline_bytes"] >= ours["anonymous_over_baseline_bytes"]
    assert not list(tmp_path.iterdir())
    console = Console(width=80, record=True)
    console.print(convert.table(result))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert f"{result['ours'][f'over_baseline_bytes, {STEPS[2]}'] / 1e6:,.0f}" in rows["over the baseline, MB"]


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 5 * 10**8))
    with pytest.raises(InputError, match=r"0\.5 GB free, 0\.\d GB needed"):
        convert.measure(options(tmp_path))


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    for changed in ({"layers": 0}, {"repeats": 0}, {"workdir": tmp_path / "missing"}):
        with pytest.raises(InputError, match=f"--{next(iter(changed))}"):
            convert.measure(argparse.Namespace(**vars(options(tmp_path)) | changed))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[object]) -> machine.Usage:
        assert list(tmp_path.glob("*/mindspore.ckpt"))
        raise error

    monkeypatch.setattr(convert, "watch", interrupted)
    with pytest.raises(error):
        convert.measure(options(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_is_told_in_one_line() -> None:
    refuse = [sys.executable, "-c", "import sys; print('error: no such format', file=sys.stderr); sys.exit(2)"]
    with pytest.raises(InputError, match=r"^a conversion failed: no such format$"):
        convert._run(refuse)
    with pytest.raises(InputError, match="a conversion failed"):
        convert._run(refuse, refused="exists already")
    assert convert._run(refuse, refused="no such format").exit_code == 2


def test_a_program_s_memory_is_its_own() -> None:
    """However much its parent has, and however short its peak."""
    held = bytearray(200 * 2**20)
    small, large = (machine.watch([sys.executable, "-c", f"b = bytearray({size} * 2**20); del b"]) for size in (1, 100))
    del held
    assert small.exit_code == large.exit_code == 0
    assert small.peak_bytes < 50 * 2**20
    assert 90 < (large.peak_bytes - small.peak_bytes) / 2**20 < 110


def test_random_weights_are_the_same_every_time() -> None:
    config = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=10, max_positions=4)
    one, other = (convert.random_weights(config, torch.float16).tensors for _ in range(2))
    assert all(torch.equal(one[name].read(), other[name].read()) for name in one)
    assert not torch.equal(one["transformer.h.0.attn.q_proj.weight"].read(), one["transformer.h.0.attn.k_proj.weight"].read())


def test_copies_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "BLOCK_BYTES", 7)
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(name.encode() * 100)
    assert convert.copy(folder, tmp_path / "copy") > 0
    assert [path.read_bytes() for path in sorted((tmp_path / "copy").iterdir())] == [b"a" * 100, b"b" * 100]


SMALL = {"batch": 2, "prompt": 5, "new": 6, "layers": 2, "hidden": 32, "heads": 2, "vocab": 100, "repeats": 3}


def test_generation_is_measured_in_turns_next_to_gpt2() -> None:
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "tools/benchmark.py", "generate", "--json", "--cpu-time", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_ids_as_recomputation"] is True
    assert result["model"] == {**SMALL, "threads": 1, "clock": "processor"}
    check_form(result)
    peer = result["peers"][turns.PEER]["all_tokens_per_second"]
    assert len(peer) == 3
    for name in ("fp32", "int8"):
        own = result["ours"][f"all_tokens_per_second, {name}"]
        ratios = sorted(one / other for one, other in zip(own, peer, strict=True))
        assert result["ratios"][turns.PEER][f"tokens_per_second, {name}"] == ratios[1] > 0
    console = Console(width=80, record=True)
    console.print(generate.table(result))
    assert f"{result['ratios'][turns.PEER]['tokens_per_second, fp32']:.2f}x" in console.export_text()


def test_a_peer_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = argparse.Namespace(**SMALL, threads=None, cpu_time=False, weights=None, text=None)
    with pytest.raises(InputError, match="transformers is not installed"):
        generate.measure(options)
    with pytest.raises(InputError, match="--new 0"):
        generate.measure(argparse.Namespace(**{**vars(options), "new": 0}))
    with pytest.raises(InputError, match="--cpu-time --threads 2"):
        generate.measure(argparse.Namespace(**{**vars(options), "cpu_time": True, "threads": 2}))


def test_scoring_is_measured_in_turns_next_to_gpt2() -> None:
    sizes = {"texts": 5, "length": 20, "suffix": 3, "batch_tokens": 40, "layers": 2, "hidden": 32, "heads": 2, "vocab": 100, "repeats": 3}
    options = argparse.Namespace(**sizes, threads=None, cpu_time=False)
    result = {**score.measure(options), "device": "a CPU"}
    assert 0 <= result["largest_difference"] < 1e-3
    check_form(result)
    for name in ("suffix", "full"):
        own, peer = (side[f"all_tokens_per_second, {name}"] for side in (result["ours"], result["peers"][turns.PEER]))
        ratios = sorted(one / other for one, other in zip(own, peer, strict=True))
        assert result["ratios"][turns.PEER][f"tokens_per_second, {name}"] == ratios[1] > 0
    console = Console(width=80, record=True)
    console.print(score.table(result))
    shown = console.export_text()
    assert f"{result['ratios'][turns.PEER]['tokens_per_second, full']:.2f}x" in shown and f"{turns.PEER}, full" in shown
    for changed, message in (({"suffix": 10}, "--suffix 10"), ({"batch_tokens": 0}, "--batch-tokens 0")):
        with pytest.raises(InputError, match=message):
            score.measure(argparse.Namespace(**vars(options) | changed))


def test_a_peer_s_scores_are_those_of_each_text_by_itself() -> None:
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=100, max_positions=20)
    peer, random = turns.gpt2(config), torch.Generator().manual_seed(1)
    spans = [Span(torch.randint(0, 100, (length,), generator=random).tolist(), start) for length, start in ((9, 1), (20, 13), (2, 1))]
    for span, found in zip(spans, score.peer_scores(peer, spans, batch_tokens=40), strict=True):
        with torch.inference_mode():
            losses = F.cross_entropy(peer(torch.tensor([span.ids])).logits[0, :-1], torch.tensor(span.ids[1:]), reduction="none")
        assert found.log_likelihood == pytest.approx(-float(losses[span.start - 1 :].sum()), abs=1e-3)
        assert found.num_tokens == len(span.ids) - span.start


def test_exactness_of_8_bit_weights(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("四川的省会是成都。\n\n北京欢迎我们，中国欢迎你。\n" * 9, "utf-8")
    write_model(tmp_path / "weights", train_tokenizer([corpus], 30, tmp_path / "tokenizer").path)
    options = argparse.Namespace(**SMALL, threads=None, weights=tmp_path / "weights", text=corpus)
    result = {**generate.measure(options), "device": "a CPU"}
    check_form(result)
    ratios = result["ratios"][generate.EXACT]
    assert 0 < abs(1 - ratios["perplexity"]) < 0.2 and 0.8 < ratios["same_likeliest_token"] <= 1
    console = Console(width=80, record=True)
    console.print(generate.table(result))
    assert f"{result['ours']['perplexity']:.4f}" in console.export_text()
    for changed, message in (({"text": None}, "go together"), ({"text": tmp_path / "missing"}, "cannot be read as UTF-8")):
        with pytest.raises(InputError, match=message):
            generate.measure(argparse.Namespace(**vars(options) | changed))


def test_turns_alternate_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    speeds = turns.take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 2, 10, iter(range(99)).__next__)
    assert "".join(order) == "cbaabccba"
    assert speeds == {name: [10.0, 10.0] for name in "abc"}
