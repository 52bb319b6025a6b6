"""tools/benchmark.py: text, data and start-up are measured, and what cannot be is refused."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers.result_form import check_form
from rich.console import Console

from pangu.benchmarks import data, machine, preprocess, prose, startup, tokenize
from pangu.errors import InputError
from pangu.text.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "sample.txt").write_text("\n\n".join(islice(prose.drawn(seed=2), 20)), "utf-8")
    return train_tokenizer([folder / "sample.txt"], 2000, folder).path.parent


@pytest.fixture
def text_options(tokenizer: Path, tmp_path: Path) -> argparse.Namespace:
    """Ten documents and how they are measured."""
    (tmp_path / "text.txt").write_text("\n\n".join(islice(prose.drawn(seed=3), 10)), "utf-8")
    return argparse.Namespace(tokenizer=tokenizer, text=[tmp_path / "text.txt"], megabytes=1, repeats=3, workdir=tmp_path, workers=2)


def shown(table: Any) -> str:
    console = Console(width=120, record=True)
    console.print(table)
    return console.export_text()


def test_tokenizing_is_measured_next_to_the_published_tokenizer(text_options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {**tokenize.measure(text_options), "device": "a CPU"}
    assert result["text"]["documents"] == 10 and result["documents_with_other_ids"] == 0 < result["tokens"]
    ours, peers = (one["all_characters_per_second"] for one in (result["ours"], result["peers"][tokenize.PEER]))
    ratios = [own / peer for own, peer in zip(ours, peers, strict=True)]
    check_form(result)
    metric = "characters_per_second"
    assert result["all_ratios"][tokenize.PEER][metric] == ratios and result["ratios"][tokenize.PEER][metric] == sorted(ratios)[1] > 0
    rows = shown(tokenize.table(result))
    assert f"{result['ratios'][tokenize.PEER][metric]:.2f}x" in rows and "tokenizer's: yes" in rows
    monkeypatch.setattr(tokenize, "published", lambda model: lambda text: [0])
    assert "tokenizer's: NO, not in 10 documents" in shown(tokenize.table({**tokenize.measure(text_options), "device": "a CPU"}))


def test_the_same_seed_draws_the_same_text(text_options: argparse.Namespace) -> None:
    one, other, third = (list(islice(prose.drawn(seed=seed), 3)) for seed in (1, 1, 2))
    assert one == other != third
    text_options.text = None
    drawn = prose.texts(text_options)
    assert 1_000_000 <= prose.describe(text_options, drawn)["bytes"] < 1_010_000


def test_preprocessing_is_measured_for_each_number_of_workers(text_options: argparse.Namespace, tmp_path: Path) -> None:
    text_options.repeats = 1
    result = {**preprocess.measure(text_options), "device": "a CPU"}
    check_form(result)
    ours, one = result["ours"], result["peers"]["one worker"]
    ratio = one["seconds"] / ours["seconds, 2 workers"]
    assert result["ratios"] == {"one worker": {"seconds, 2 workers": ratio}}
    assert ours["peak_bytes, 2 workers"] > 30 * 2**20 and ours["documents_per_second, 2 workers"] == 10 / ours["seconds, 2 workers"]
    assert f"{ratio:.2f}x" in shown(preprocess.table(result)) and f"{one['seconds']:.2f}" in shown(preprocess.table(result))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_loading_and_index_are_measured(tmp_path: Path) -> None:
    options = argparse.Namespace(documents=1000, tokens=40_000, sequence=64, repeats=1, workdir=tmp_path)
    result = {**data.measure(options), "device": "a CPU"}
    check_form(result)
    assert len(result["model"]["loading"]) == 4
    assert result["ours"]["seconds, index"] > 0 and result["ours"]["peak_bytes, index"] > 20 * 2**20
    assert "index of 1,000 documents" in shown(data.table(result))
    assert not list(tmp_path.iterdir())


def test_start_and_checkpoint_are_measured(tmp_path: Path) -> None:
    options = argparse.Namespace(repeats=1, parameters=1, workdir=tmp_path)
    result = {**startup.measure(options), "device": "a CPU"}
    check_form(result)
    ours, phases = result["ours"], [result["ours"][f"seconds, {phase}"] for phase in startup.PHASES]
    assert min(phases) > 0 and sum(phases) == pytest.approx(ours["seconds"]) and 0 < result["ratios"]["import torch"]["seconds"] < 1
    assert result["model"]["checkpoint_bytes"] > 8 * 500_000 and ours["bytes_per_second, save"] > 0 < ours["bytes_per_second, load"]
    assert "command to first step" in shown(startup.table(result))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", [tokenize, preprocess, data, startup])
def test_impossible_numbers_are_refused_by_name(task: Any, text_options: argparse.Namespace) -> None:
    options = argparse.Namespace(**vars(text_options), documents=1, tokens=1, sequence=1, parameters=1)
    with pytest.raises(InputError, match="--repeats 0: expected 1 or more"):
        task.measure(argparse.Namespace(**vars(options) | {"repeats": 0}))


def test_a_program_s_family_is_counted_together() -> None:
    script = "import os, time; held = bytearray(60 * 2**20); os.fork() or bytearray(80 * 2**20) and time.sleep(0.6); time.sleep(0.6)"
    usage = machine.watch([sys.executable, "-c", script], family=True)
    assert 60 < usage.family_bytes / 2**20 < 120  # what both hold counts once
