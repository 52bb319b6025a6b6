"""The recipes people copy: they load, they fit the number of devices they name, and they say what the paper says."""

import json
from pathlib import Path

import pytest

from megatron_ext.topology import Topology
from pangu.config import load_config
from pangu.config.layout import resolve
from pangu.errors import InputError

RECIPES = Path(__file__).parents[3] / "ds_configs"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("350M", Topology(tensor=1, pipeline=1, data=8)),
        ("2.6B", Topology(tensor=8, pipeline=1, data=64)),
        ("13B", Topology(tensor=8, pipeline=1, data=128)),
        ("200B", Topology(tensor=8, pipeline=16, data=16)),
    ],
)
def test_recipe_fits_the_devices_it_names(name: str, layout: Topology) -> None:
    path = RECIPES / f"{name}.yaml"
    config = load_config(path)
    assert config.model.preset == name
    assert resolve(config, layout.world_size).topology == layout
    sizes = f"# Devices: {layout.world_size} (tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data})"
    assert sizes in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "steps", "lr", "betas", "weight_decay"),
    [
        ("2.6B", 70_000, 1e-4, (0.9, 0.999), 0.01),
        ("13B", 84_000, 5e-5, (0.9, 0.98), 0.01),
        ("200B", 260_000, 2e-5, (0.9, 0.95), 0.1),
    ],
)
def test_recipe_is_the_papers_table_5(name: str, steps: int, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    assert config.train.steps == steps
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (lr, betas, weight_decay)


def test_second_half_of_the_200b_run_fits_1024_devices() -> None:
    assert resolve(load_config(RECIPES / "200B.yaml"), 1024).topology.data == 8


@pytest.mark.parametrize("name", ["2.6B", "13B"])
def test_smaller_recipes_fit_one_server(name: str) -> None:
    assert resolve(load_config(RECIPES / f"{name}.yaml"), 8).topology.data == 1


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"),
    [
        ("zero0", 0, []),
        ("zero1", 1, []),
        ("zero2", 2, []),
        ("zero3", 3, []),
        ("zero1-offload", 1, ["offload_optimizer"]),
        ("zero2-offload", 2, ["offload_optimizer"]),
        ("zero3-offload", 3, ["offload_optimizer", "offload_param"]),
    ],
)
def test_json_decides_the_zero_stage_of_a_recipe(name: str, stage: int, offloaded: list[str]) -> None:
    config = load_config(RECIPES / "350M.yaml", [f"deepspeed={name}.json", "train.precision=fp32"])
    assert config.parallel.zero_stage == stage
    zero = resolve(config, 8).deepspeed["zero_optimization"]
    assert [key for key in zero if key.startswith("offload")] == offloaded


def test_every_json_is_tested_here() -> None:
    names = sorted(path.stem for path in RECIPES.glob("*.json"))
    assert names == ["zero0", "zero1", "zero1-offload", "zero2", "zero2-offload", "zero3", "zero3-offload"]
    assert all(json.loads((RECIPES / f"{name}.json").read_text()) for name in names)


def test_200b_recipe_refuses_zero_2() -> None:
    config = load_config(RECIPES / "200B.yaml", ["deepspeed=zero2.json"])
    with pytest.raises(InputError, match=r"parallel\.zero_stage = 2 does not work with parallel\.pipeline = 16"):
        resolve(config, 2048)
