"""What a run refuses before any process waits for another; whole runs: tests/cli/test_train.py, tests/faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from helpers.tiny_run import write_recipe
from helpers.whole_model import small_weights

from megatron_ext import accelerator
from pangu.config import Config
from pangu.config.layout import resolve
from pangu.config.load import load_config
from pangu.conversion.convert import convert
from pangu.conversion.weights import WriteOptions
from pangu.errors import InputError
from pangu.training import run
from pangu.training.run import run_training


class Tokenizer:
    """As many ids as a test says, and <eot> where it says."""

    vocab_size, eot_id, sha256 = 50, 9, "0" * 64

    def __init__(self, path: Path) -> None:
        pass


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(write_recipe(folder), list(overrides))


def refuse(config: Config, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the ranks were waited for")

    monkeypatch.setattr(run.rendezvous, "initialize", never)
    with pytest.raises(InputError, match=told):
        run_training(config, resolve(config, 1))
    assert not torch.distributed.is_initialized()
    assert not (config.run.dir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("vocab_size", "eot_id", "told"),
    [
        (51, 9, r"^model\.vocab_size = 50, but the tokenizer .*tok has 51 ids\. Set model\.vocab_size=51\."),
        (50, 8, r"^model\.separator_id = 9, but .* is 8\. Set model\.separator_id=8\."),
    ],
)
def test_another_tokenizer_is_refused(vocab_size: int, eot_id: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PanguTokenizer", Tokenizer)
    monkeypatch.setattr(Tokenizer, "vocab_size", vocab_size)
    monkeypatch.setattr(Tokenizer, "eot_id", eot_id)
    refuse(config_of(tmp_path, f"data.tokenizer={tmp_path}/tok"), told, monkeypatch)


def test_a_data_set_of_another_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PanguTokenizer", Tokenizer)
    monkeypatch.setattr(Tokenizer, "sha256", "1" * 64)
    refuse(config_of(tmp_path, f"data.tokenizer={tmp_path}/tok"), "tokenizer", monkeypatch)


def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "supports", lambda precision: precision == "fp32")
    refuse(config_of(tmp_path, "train.precision=bf16"), r"^train\.precision = bf16: .* does not train in it\. Choose fp32\.", monkeypatch)


def test_data_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(config_of(tmp_path, f"data.train={tmp_path}/nowhere"), "nowhere", monkeypatch)


def test_initial_weights_of_another_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(small_weights(), "huggingface", tmp_path / "weights", WriteOptions())
    refuse(config_of(tmp_path, f"checkpoint.init_from={tmp_path}/weights"), r"checkpoint\.init_from = .*weights", monkeypatch)
