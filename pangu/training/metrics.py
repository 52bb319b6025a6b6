"""Where a run's figures go: metrics.jsonl, TensorBoard where it is installed, and the terminal."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_ext import accelerator
from pangu.config import Config
from pangu.files import append_to, open_file


class Metrics:
    """Writes one JSON object a step and keeps the terminal informed. Only rank 0 has one.

    Args:
        config: the run.
        first_step: the step the run starts or resumes at.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self._config, self._first_step, self._lines = config, first_step, 0
        directory = config.run.dir
        directory.mkdir(parents=True, exist_ok=True)
        # One write a line, at the end of the file: a kill can cut only the last line, and a resumed run appends.
        self._file = append_to(directory / "metrics.jsonl")
        _end_last_line(self._file, directory / "metrics.jsonl")
        self._tensorboard = _summary_writer(directory / "tensorboard", first_step) if config.run.tensorboard else None
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[figures]}"))
            self._task = self._progress.add_task("train", total=config.train.steps, completed=first_step, figures="")
            self._progress.start()

    def step(self, figures: dict[str, Any]) -> None:
        """Record one optimizer step; `figures["step"]` counts the steps done."""
        self._record(figures)
        step, last = figures["step"], self._config.train.steps
        if self._progress is not None:
            text = f"loss {_LOSS.cell(figures)}  {_SPEED.cell(figures)} tokens/s  {_LEFT.cell(figures)} left"
            self._progress.update(self._task, completed=step, figures=text)
        if step in (self._first_step + 1, last) or step % self._config.run.log_every == 0:
            columns = [column for column in _COLUMNS if column.key not in _OPTIONAL or figures.get(column.key) is not None]
            width = len(f"{last}/{last}")
            if self._lines % HEADING_EVERY == 0:
                self.say(" ".join(["step".ljust(width), *(column.name.rjust(column.width) for column in columns)]))
            self.say(" ".join([f"{step}/{last}".ljust(width), *(column.cell(figures).rjust(column.width) for column in columns)]))
            self._lines += 1

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


HEADING_EVERY = 20
"""Lines of figures under one heading."""


class _Column(NamedTuple):
    """A figure on the terminal."""

    key: str
    name: str
    width: int
    text: Callable[[float], str]

    def cell(self, figures: dict[str, Any]) -> str:
        """The figure, or a dash where there is none."""
        value = figures.get(self.key)
        return "-" if value is None else self.text(value)


def _duration(seconds: float) -> str:
    """A time in at most six characters: 3:20, 2h05m, 12d03h."""
    minutes, hours, days = (int(seconds // unit) for unit in (60, 3600, 86400))
    if not hours:
        return f"{minutes}:{int(seconds % 60):02}"
    return f"{days}d{hours % 24:02}h" if days else f"{hours}h{minutes % 60:02}m"


def _memory(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.{1 if gib < 99.95 else 0}f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"


def _scale(scale: float) -> str:
    power = math.log2(scale)
    return f"2^{power:.0f}" if power.is_integer() else f"{scale:.3g}"


_COLUMNS = (
    _LOSS := _Column("loss", "loss", 7, "{:.4f}".format),
    _Column("learning_rate", "lr", 7, "{:.1e}".format),
    _Column("grad_norm", "norm", 5, lambda norm: f"{norm:.3g}" if norm < 1000 else f"{norm:.0e}"),
    _SPEED := _Column("tokens_per_second", "tokens/s", 9, "{:,.0f}".format),
    _LEFT := _Column("seconds_left", "left", 6, _duration),
    _Column("peak_memory_bytes", "memory", 8, _memory),
    _Column("consumed_epochs", "epochs", 6, lambda epochs: f"{epochs:.{2 if epochs >= 1 else 4}f}"),
    _Column("mfu", "MFU", 5, "{:.1%}".format),
    _Column("loss_scale", "scale", 5, _scale),
)
"""What a line shows: 80 columns with up to 999,999 steps. The last two are left out where they are not known."""
_OPTIONAL = ("mfu", "loss_scale")


def _end_last_line(file: Any, path: Path) -> None:
    """A line that a kill cut short must not swallow the next one."""
    if path.stat().st_size:
        with open_file(path) as existing:
            existing.seek(-1, 2)
            if existing.read(1) != b"\n":
                file.write("\n")


def _summary_writer(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=first_step + 1)


def peak_memory_bytes() -> int | None:
    """Most memory this process has had: tensors on the accelerator, on the CPU all that was resident; None where nothing tells it."""
    if allocated := accelerator.max_memory_allocated():
        return allocated
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(peak[1]) if peak else None
