"""`tools/inspect_checkpoint.py`: what it prints, its exit codes, and that it never answers with a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pangu.conversion.convert import convert
from pangu.conversion.formats import open_weights
from pangu.conversion.weights import Overrides, WriteOptions

ROOT = Path(__file__).parents[2]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/inspect_checkpoint.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_original_is_described_and_sound(shared: Path) -> None:
    path = shared / "oracle/A/pangu_tiny_train_step5.ckpt"
    result = run(path, "--verify", "--tensors", "--heads", "4")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert "model:      3 layers (query layer included), hidden 64, heads 4, ffn 256, vocabulary 512, positions 32" in lines
    assert "parameters: 186,944 in 53 tensors" in lines and "step:       5" in lines
    assert "left out:   optimizer 106, bookkeeping 2" in lines
    assert sum(line.startswith(" transformer.") for line in lines) == 53
    weight = open_weights(path, Overrides(num_heads=4)).tensors["transformer.h.2.mlp.c_fc.weight"].read()
    (row,) = (line.split() for line in lines if "h.2.mlp.c_fc.weight" in line)
    numbers = (*weight.aminmax(), weight.mean(), weight.std(correction=0))
    assert row[1:] == ["[256,", "64]", "float32", *(f"{float(number):.4g}" for number in numbers)]
    assert lines[-1] == "sound: every weight was read, no problems"
    assert run(path).stdout.splitlines()[-1] == "sound in names and shapes; --verify reads the numbers too"


def test_each_problem_has_a_line_and_the_exit_code_is_2(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    convert(open_weights(shared / "oracle/A/pangu_tiny.ckpt", Overrides(num_heads=4)), "huggingface", path, WriteOptions())
    (file,) = path.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("transformer.h.2.mlp.")}
    tensors["a[red]\n\x1b[31m"] = torch.zeros(2, 2)
    tensors["transformer.wpe.weight"][3, 4] = torch.nan
    file.unlink()
    (path / "model.safetensors.index.json").unlink()
    save_file(tensors, path / "model.safetensors")
    result = run(path, "--verify", "--tensors")
    assert result.returncode == 2 and result.stderr == "" and "\x1b" not in result.stdout
    assert result.stdout.splitlines()[-8:] == [
        *(f"problem: lacks transformer.h.2.mlp.{name}" for name in ("c_fc.bias", "c_fc.weight", "c_proj.bias", "c_proj.weight")),
        "problem: holds unknown a[red]\\n\\x1b[31m",
        "problem: transformer.wpe.weight has 1 NaN and 0 infinite numbers of 2,048, the first at [3, 4]",
        "problem: a[red]\\n\\x1b[31m is constant: each of its 4 numbers is 0",
        "NOT SOUND: 7 problems",
    ]
    told = json.loads(run(path, "--json", "--verify", "--tensors").stdout)
    assert told["sound"] is False and len(told["problems"]) == 7 and len(told["tensors"]) == 50
    assert told["model"]["num_layers"] == 3 and told["tensors"][1]["num_nan"] == 1


def test_what_cannot_be_looked_at_is_refused_in_a_line(shared: Path, tmp_path: Path) -> None:
    source = shared / "oracle/A/pangu_tiny.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(source.read_bytes()[:-1])
    shutil.copy(source, tmp_path / "file.pt")
    for words in ([tmp_path / "nothing"], [cut, "--verify", "--json"], [tmp_path / "file.pt", "--from", "megatron"]):
        result = run(*words)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
