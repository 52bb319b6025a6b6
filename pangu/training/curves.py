"""Reads the loss of a run from its metrics.jsonl and draws its curve in a terminal."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pangu.errors import InputError
from pangu.files import open_file

# Unicode braille: a character is 2 x 4 dots, each a bit over U+2800. DOTS[row][column] is the dot's bit.
BRAILLE, DOTS = 0x2800, ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass
class Curves:
    """The loss curves of a run from metrics.jsonl: step -> loss, in ascending steps."""

    name: str
    training: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Remarks about the file, such as a line that was cut off."""


def read_run(directory: Path) -> Curves:
    """The loss curves of a run directory.

    A line that was cut off, by a process killed while it wrote, is left out with a note; so are losses that are not finite.

    Raises:
        InputError: if there is no metrics.jsonl, or no loss in it.
    """
    path = directory / "metrics.jsonl"
    try:
        with open_file(path) as file:
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Name a run directory, one that training wrote into.") from error
    curves = Curves(str(directory))
    for number, line in enumerate(lines, start=1):
        try:
            _add(curves, json.loads(line))
        except (ValueError, TypeError, KeyError):
            curves.notes.append(f"{path}: line {number} was cut off and is left out")
    for series in (curves.training, curves.validation):
        for step in [step for step, loss in series.items() if not math.isfinite(loss)]:
            del series[step]
            curves.notes.append(f"{path}: the loss of step {step} is not finite and is left out")
    if not curves.training:
        raise InputError(f"{path}: no step with a finite loss in {len(lines)} lines. Train longer, or name another run directory.")
    curves.training, curves.validation = dict(sorted(curves.training.items())), dict(sorted(curves.validation.items()))
    return curves


def _add(curves: Curves, metrics: dict[str, Any]) -> None:
    """Enter one line of metrics.jsonl."""
    step = int(metrics["step"])
    if "loss" in metrics:
        curves.training[step] = float(metrics["loss"])
    if "validation_loss" in metrics:
        curves.validation[step] = float(metrics["validation_loss"])


def terminal_chart(series: dict[int, float], *, width: int = 64, height: int = 12, braille: bool = True) -> str:
    """The series as lines of text, with a scale at the left and the steps below.

    Args:
        series: step -> value, at least one.
        width: number of columns of the plotted area.
        height: number of lines of the plotted area.
        braille: draw with braille characters of eight dots each; False draws with plain ASCII.
    """
    columns, rows = (2 * width, 4 * height) if braille else (width, height)
    low, high = min(series.values()), max(series.values())
    first, last = min(series), max(series)
    dots = {
        (
            round((high - value) / ((high - low) or 1) * (rows - 1)),
            round((step - first) / ((last - first) or 1) * (columns - 1)),
        )
        for step, value in series.items()
    }
    label = max(len(f"{value:.3f}") for value in (low, high))
    lines = []
    for line in range(height):
        value = high - (high - low) * line / (height - 1)
        scale = f"{value:.3f}" if line % 3 == 0 or line == height - 1 else ""
        lines.append(f"{scale:>{label}} {'┤' if braille else '|'}{_plot_line(dots, line, width, braille)}".rstrip())
    lines.append(" " * label + (" └" + "─" * width if braille else " +" + "-" * width))
    lines.append(" " * (label + 2) + f"step {first}" + f"{last}".rjust(width - len(f"step {first}")))
    return "\n".join(lines)


def _plot_line(dots: set[tuple[int, int]], line: int, width: int, braille: bool) -> str:
    """One line of the plotted area; a dot is (row, column), from the top left."""
    if not braille:
        return "".join("*" if (line, column) in dots else " " for column in range(width))
    cells = (
        sum(bit for row, bits in enumerate(DOTS) for column, bit in enumerate(bits) if (4 * line + row, 2 * cell + column) in dots)
        for cell in range(width)
    )
    return "".join(chr(BRAILLE + cell) if cell else " " for cell in cells)


def print_curves(curves: Curves) -> None:
    """Print the training loss as a chart, in ASCII where the terminal cannot show more, and the validation losses below it."""
    braille = (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")
    print(f"{curves.name}: training loss")
    print(terminal_chart(curves.training, braille=braille))
    if curves.validation:
        shown = list(curves.validation.items())[-5:]
        print("validation loss: " + ", ".join(f"{loss:.4f} at step {step}" for step, loss in shown))
