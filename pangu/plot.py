"""Draw the loss of one or several runs.

    python tools/plot_run.py runs/a                              # in the terminal
    python tools/plot_run.py runs/a runs/b --output loss.png     # a picture; needs matplotlib, part of the extra [monitor]

reads metrics.jsonl of each run directory. If a step was repeated after a resume, its last line counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pangu.errors import InputError, exit_code
from pangu.training.curves import Curves, print_curves, read_run

PICTURES = (".png", ".svg", ".pdf")


def save_picture(runs: Sequence[Curves], path: Path) -> None:
    """Draw all runs into one picture, in the format of its suffix: training as lines, validation as points of the same colour.

    Raises:
        InputError: if matplotlib is not installed, the suffix is unknown, or the file cannot be written.
    """
    if path.suffix.lower() not in PICTURES:
        raise InputError(f"--output {path}: a name that ends in {', '.join(PICTURES)} expected.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "matplotlib, which draws the picture, is not installed: pip install 'pangu-alpha-pytorch[monitor]', "
            "or leave --output out for a chart in the terminal."
        ) from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for curves in runs:
        (line,) = axes.plot(list(curves.training), list(curves.training.values()), linewidth=1, label=curves.name)
        if curves.validation:
            steps, losses = list(curves.validation), list(curves.validation.values())
            axes.plot(steps, losses, "o", color=line.get_color(), label=f"{curves.name}, validation")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror}). Name a file in a folder you may write to.") from error


@exit_code
def main() -> None:
    """Parse the command line; print the charts or write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="directories that training wrote into")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"picture to write ({', '.join(PICTURES)}); without it, print a chart")
    arguments = parser.parse_args()
    runs = [read_run(directory) for directory in arguments.runs]
    for note in (note for curves in runs for note in curves.notes):
        print(f"note: {note}", file=sys.stderr)
    if arguments.output is None:
        for curves in runs:
            print_curves(curves)
    else:
        save_picture(runs, arguments.output)
        print(f"{arguments.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


if __name__ == "__main__":
    main()
