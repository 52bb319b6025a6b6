"""Every layout's checkpoint resumed on every other one. As a program it prints the table of differences, in Markdown:

python tests/distributed/resume_matrix.py
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    import conftest  # noqa: F401  (the environment of the ranks)

from helpers.harness import run_distributed
from helpers.layouts import random_batches, small_config, start

from pangu.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from pangu.training.learning_rate import learning_rate

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, no ZeRO": (1, {"zero_stage": 0}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2, ZeRO-1": (2, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2 x pipeline 2 x data 2": (8, {"tensor": 2, "pipeline": 2}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}),
    "tensor 4, ZeRO-3": (4, {"tensor": 4, "zero_stage": 3}),
}
"""The vocabulary of 50 divides by neither 4 nor, on pipelines, into equal parts: what is padded differs from layout to layout."""
SAVED_AT, STEPS = 3, 6
Steps = list[tuple[float, float]]


def train(directory: str, parallel: dict[str, Any], num_steps: int, echo: str | None = None, **sections: Any) -> Steps:
    """Resume if there is a checkpoint and train to `num_steps`; (loss, norm) of each step.

    Args:
        directory: of the checkpoints.
        parallel: the layout.
        num_steps: of the whole run.
        echo: a directory in which to save what was resumed, before it is trained further; None saves at the end, in `directory`.
        sections: of the configuration.
    """
    config = small_config(parallel=parallel, checkpoint={"dir": directory}, **sections)
    engine = start(config)
    checkpoint = find_checkpoint(config, engine.groups.world)
    progress = load_checkpoint(engine, checkpoint) if checkpoint else Progress()
    if echo:
        engine.config = small_config(parallel=parallel, checkpoint={"dir": echo}, **sections)
        save_checkpoint(engine, progress)
        engine.config = config
    batches = random_batches(config, engine.groups, first_step=progress.step)
    results = []
    while progress.step < num_steps:
        result = engine.train_step(batches, learning_rate(config, progress.step))
        results.append((result.loss, result.grad_norm))
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size
    if not echo:
        save_checkpoint(engine, progress)
    return results


def save_all(root: Path) -> None:
    """Each layout's checkpoint under its name."""
    for layout, (ranks, parallel) in LAYOUTS.items():
        run_distributed(train, ranks, str(root / layout), parallel, SAVED_AT)


def resume(saved: Path, source: str, target: str, folder: Path) -> Steps:
    """A copy of `source`'s checkpoint goes on as `target`; what was resumed lies in `folder/echo`."""
    shutil.copytree(saved / source, folder / "run")
    ranks, parallel = LAYOUTS[target]
    resumed = run_distributed(train, ranks, str(folder / "run"), parallel, STEPS, str(folder / "echo"))
    assert all(one == resumed[0] for one in resumed)
    return resumed[0]


def largest_difference(one: Steps, other: Steps) -> float:
    """Of losses and gradient norms."""
    return max(abs(ours - theirs) for ours, theirs in zip(itertools.chain(*one), itertools.chain(*other), strict=True))


def main() -> None:
    """Print, for each pair, the largest difference of loss and norm from a run of one process that was never interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_all(root / "saved")
        unbroken = run_distributed(train, 1, str(root / "unbroken"), {}, STEPS)[0][SAVED_AT:]
        print(f"| saved on ↓, resumed on → | {' | '.join(LAYOUTS)} |")
        print("|---" * (len(LAYOUTS) + 1) + "|")
        for source in LAYOUTS:
            cells = []
            for target in LAYOUTS:
                with tempfile.TemporaryDirectory() as place:
                    cells.append(f"{largest_difference(resume(root / 'saved', source, target, Path(place)), unbroken):.1e}")
            print(f"| {source} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
