"""`pangu.train`, one rank of which does something wrong at one step.

    FAULT="KIND RANK STEP" python tests/faults/train_with_fault.py --config ...

KIND `none` only makes every step take a tenth of a second longer. A fault happens in the first start only, not after a restart.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as pangu.train does, too late for the import below

import torch
from torch import Tensor

import pangu.training.loop
from megatron_ext.topology import Group
from pangu.engine.engine import TrainingEngine
from pangu.train import main


class Fault(Exception):
    """What the faulty rank raises."""


def fail(*_: Any) -> None:
    raise Fault("injected")


def pause(*_: Any) -> None:
    time.sleep(600)


def freeze(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_loader(step: int, action: Callable[[], None]) -> None:
    original = pangu.training.loop.micro_batches

    def micro_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in original(*args, **kwargs):
            if STEP[0] == step:
                action()
            yield batch

    pangu.training.loop.micro_batches = micro_batches


def in_collective(step: int, action: Callable[[Tensor, Group], None]) -> None:
    original = pangu.training.loop.all_reduce_max

    def all_reduce_max(x: Tensor, group: Group) -> Tensor:
        if STEP[0] == step:
            action(x, group)
        return original(x, group)

    pangu.training.loop.all_reduce_max = all_reduce_max


def another_shape(x: Tensor, group: Group) -> None:
    torch.distributed.all_reduce(torch.zeros(1000), group=group.handle)


def at_step(step: int, action: Callable[[TrainingEngine], None]) -> None:
    original = TrainingEngine.train_step

    def train_step(self: TrainingEngine, *args: Any) -> Any:
        STEP[0] += 1
        time.sleep(0.1)
        if STEP[0] == step:
            action(self)
        return original(self, *args)

    TrainingEngine.train_step = train_step


def in_forward(engine: TrainingEngine) -> None:
    engine.module.register_forward_pre_hook(fail)


def in_backward(engine: TrainingEngine) -> None:
    next(engine.module.parameters()).register_hook(fail)


STEP = [0]
ENGINE = {"forward": in_forward, "backward": in_backward}
LOADER = {"loader": fail, "pause": pause, "freeze": freeze, "die": die}
COLLECTIVE = {"collective": fail, "shape": another_shape}


def train() -> None:
    """Train, with the fault that $FAULT names."""
    kind, rank, step = os.environ["FAULT"].split()
    run_dir = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("run.dir=")))
    chosen = os.environ.get("RANK", "0") == rank and not (run_dir / "fault").exists()
    if chosen and kind in LOADER:
        in_loader(int(step), LOADER[kind])
    if chosen and kind in COLLECTIVE:
        in_collective(int(step), COLLECTIVE[kind])

    def happen(engine: TrainingEngine) -> None:
        if chosen:
            (run_dir / "fault").touch()
            ENGINE.get(kind, lambda engine: None)(engine)

    at_step(int(step), happen)
    main()


if __name__ == "__main__":
    train()
