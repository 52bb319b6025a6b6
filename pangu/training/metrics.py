"""Where a run's figures go: metrics.jsonl, TensorBoard where it is installed, and the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pangu.config import Config


class Metrics:
    """Writes one JSON object a step and keeps the terminal informed. Only rank 0 has one.

    Args:
        config: the run.
        first_step: the step the run starts or resumes at.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self._config = config
        directory = config.run.dir
        directory.mkdir(parents=True, exist_ok=True)
        # One write a line, at the end of the file: a kill can cut only the last line, and a resumed run appends.
        self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by `close`)
        _end_last_line(self._file, directory / "metrics.jsonl")
        self._tensorboard = _summary_writer(directory / "tensorboard", first_step) if config.run.tensorboard else None
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
            )
            self._task = self._progress.add_task("train", total=config.train.steps, completed=first_step, figures="")
            self._progress.start()

    def step(self, figures: dict[str, Any]) -> None:
        """Record one optimizer step; `figures["step"]` counts the steps done."""
        self._record(figures)
        text = "  ".join(f"{label} {figures[key]:{form}}" for key, label, form in _SHOWN if figures.get(key) is not None)
        if self._progress is not None:
            self._progress.update(self._task, completed=figures["step"], figures=text)
        elif figures["step"] % self._config.run.log_every == 0 or figures["step"] == self._config.train.steps:
            print(f"step {figures['step']}/{self._config.train.steps}  {text}", flush=True)

    def evaluation(self, figures: dict[str, Any]) -> None:
        """Record an evaluation."""
        self._record(figures)
        self.say(
            f"step {figures['step']}  validation loss {figures['validation_loss']:.4f}  perplexity {figures['validation_perplexity']:.2f}"
        )

    def note(self, step: int, kind: str, text: str) -> None:
        """Record something in words, and say it."""
        self._record({"step": step, kind: text})
        self.say(f"step {step}: {text}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar, or a plain one."""
        console = self._progress.console if self._progress is not None else Console(soft_wrap=True, highlight=False)
        console.print(text, markup=False)

    def close(self) -> None:
        """Finish the progress bar and the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()

    def _record(self, figures: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: value for key, value in figures.items() if value is not None}) + "\n")
        if self._tensorboard is not None:
            for key, value in figures.items():
                if value is not None and not isinstance(value, str) and key not in ("step", "consumed_samples"):
                    self._tensorboard.add_scalar(key, value, figures["step"])


_SHOWN = (
    ("loss", "loss", ".4f"),
    ("grad_norm", "grad norm", ".3f"),
    ("learning_rate", "lr", ".2e"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
    ("loss_scale", "loss scale", ".0f"),
)


def _end_last_line(file: Any, path: Path) -> None:
    """A line that a kill cut short must not swallow the next one."""
    if path.stat().st_size:
        with open(path, "rb") as existing:
            existing.seek(-1, 2)
            if existing.read(1) != b"\n":
                file.write("\n")


def _summary_writer(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=first_step + 1)
