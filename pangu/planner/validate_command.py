"""Predict published training runs, and print predictions beside what was measured.

The constants of the time model are fitted to the measured runs of one CSV file, or read from a profile, or the defaults. The runs are those
of pangu/planner/reference_runs.csv unless a file is given. What a row leaves out and what was assumed for it goes to standard error; a row
that cannot be understood is predicted as null.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pangu.config.recipes import CLUSTERS
from pangu.errors import InputError, one_line
from pangu.planner.profile import load_profile, save_profile
from pangu.planner.reference import REFERENCE_RUNS, Row, Run, read_runs
from pangu.planner.validation import Fit, cross_validate, fit, fits_in_memory, score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `validate`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--fit", type=Path, metavar="CSV", help="fit the constants to the measured runs of this file")
    source.add_argument("--profile", type=Path, metavar="YAML", help="read the constants; without either the defaults are used")
    parser.add_argument("--runs", type=Path, metavar="CSV", help="predict these runs (default: the published ones that ship)")
    parser.add_argument(
        "--cross", action="store_true", help="predict each family and day of --fit, or of the runs that ship, from a fit to all the others"
    )
    parser.add_argument("--output", type=Path, metavar="YAML", help="write the constants, to be read with --profile")
    parser.add_argument("--json", action="store_true", help="print JSON: a list with one object for each run, or each family")


def run(arguments: argparse.Namespace) -> None:
    """Fit, predict, print.

    Raises:
        InputError: if the options exclude each other, or a file is refused.
    """
    if arguments.cross and (arguments.profile or arguments.runs):
        raise InputError("--cross predicts runs of the file that is fitted: leave out --profile and --runs.")
    fitted = Fit(load_profile(arguments.profile), {}) if arguments.profile else Fit.default()
    if arguments.fit or arguments.cross:
        runs = [row.run for row in understood(arguments.fit or REFERENCE_RUNS) if row.run]
        fitted = fit(runs)
        if arguments.cross:
            print_families(cross_validate(runs), as_json=arguments.json)
    if arguments.output:
        save_profile(fitted.profile, arguments.output)
    if not arguments.cross:
        print_runs(understood(arguments.runs or REFERENCE_RUNS), fitted, as_json=arguments.json)


def understood(path: Path) -> list[Row]:
    """Read the rows of a file; assumptions, and rows that cannot be predicted, are printed to standard error."""
    rows = read_runs(path, CLUSTERS)
    for row in rows:
        for note in [row.reason] if row.run is None else row.run.notes:
            print(one_line(f"{path.name}: {row.id}: {note}{' (not predicted)' if row.run is None else ''}"), file=sys.stderr)
    return rows


def print_runs(rows: list[Row], fitted: Fit, *, as_json: bool) -> None:
    """One line, or object, for each row."""
    predictions = [
        (row, fits_in_memory(row.run), fitted.predict(row.run) if row.run.batch_is_known else None, row.run.seconds)
        if row.run
        else (row, None, None, None)
        for row in rows
    ]
    if as_json:
        found = [
            {"id": row.id, "feasible": feasible, "predicted_iter_s": predicted, "measured_iter_s": measured}
            for row, feasible, predicted, measured in predictions
        ]
        print(json.dumps(found, indent=1))
        return
    table = Table("run", "fits", "predicted s", "measured s", "error", box=None)
    for row, feasible, predicted, measured in predictions:
        error = f"{predicted / measured - 1:+.1%}" if predicted and measured else ""
        words = {True: "yes", False: "no", None: "?"}[feasible]
        table.add_row(Text(one_line(row.id)), words, *(f"{x:.2f}" if x else "" for x in (predicted, measured)), error)
    Console().print(table)
    timed = [(row.run, predicted) for row, _, predicted, measured in predictions if row.run and predicted and measured]
    if timed:
        overall = score(*zip(*timed, strict=True))
        share = f" ({overall.right / overall.pairs:.0%})" if overall.pairs else ""
        print(f"mean error {overall.error:.1%} of {overall.runs} runs")
        print(f"{overall.right} of {overall.pairs} pairs of one family and day are in order{share}")


def print_families(groups: Sequence[tuple[str, list[Run], list[float]]], *, as_json: bool) -> None:
    """One line, or object, for each family and day that was left out of a fit, and one for all."""
    everything = ("all", [run for _, held, _ in groups for run in held], [x for _, _, predicted in groups for x in predicted])
    scores = [(name, score(held, predicted)) for name, held, predicted in [*groups, everything]]
    if as_json:
        print(json.dumps([{"left_out": name, **vars(found)} for name, found in scores], indent=1))
        return
    table = Table("left out", "runs", "mean error", "pairs in order", box=None)
    for name, found in scores:
        table.add_row(Text(one_line(name)), str(found.runs), f"{found.error:.1%}", f"{found.right} of {found.pairs}")
    Console().print(table)
