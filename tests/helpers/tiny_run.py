"""A tiny recipe over random documents, and what a run of it left, for tests that start whole programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pangu.data.indexed import IndexedDatasetWriter


def write_recipe(folder: Path) -> Path:
    """Write the recipe and its data set; returns the recipe."""
    rng = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "corpus", vocab_size=50, separator_id=9, tokenizer_sha256="0" * 64) as writer:
        for length in rng.integers(5, 40, 200):
            writer.add(np.append(rng.integers(10, 50, length - 1), 9).astype(np.uint16), np.array([length], np.int32))
    values: dict[str, Any] = {
        "model": {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "vocab_size": 50, "max_positions": 16},
        "train": {"micro_batch_size": 2, "global_batch_size": 8, "steps": 6, "eval_every": 3, "eval_batches": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr": 1e-5},
        "data": {"train": str(folder / "corpus"), "validation_fraction": 0.1},
        "run": {"dir": str(folder / "run"), "tensorboard": False},
    }
    values["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def values(run_dir: Path, key: str) -> list[float]:
    """One figure of every line that has it."""
    return [line[key] for line in figures(run_dir) if key in line]
