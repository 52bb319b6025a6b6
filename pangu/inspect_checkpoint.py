"""Show what a checkpoint of any format is, and what is wrong with it.

    python tools/inspect_checkpoint.py weights/2.6B                       # format, sizes, layout; missing, unknown and misshapen tensors
    python tools/inspect_checkpoint.py runs/mine/checkpoints --verify     # reads all of it: NaN, constant tensors, checksums, replicas
    python tools/inspect_checkpoint.py PanguAlpha_2.6B_fp16.ckpt --tensors --verify

Exit code 0: sound; 2: it has problems, each on a line of its own, or cannot be read at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from pangu.errors import exit_code, one_line


@exit_code
def main() -> None:
    """Parse the command line, inspect the checkpoint and print the report."""
    from pangu.conversion.formats import FORMATS
    from pangu.conversion.inspection import bytes_to_verify, look, verify

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="PATH", help="file or directory of any format")
    parser.add_argument("--verify", action="store_true", help="read all data, not only names and shapes")
    parser.add_argument("--tensors", action="store_true", help="list the tensors, with --verify also their minimum, maximum and mean")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--from", dest="source", default="auto", choices=["auto", *FORMATS], help="format (default: detected from the files)"
    )
    parser.add_argument("--heads", type=int, metavar="N", help="number of attention heads, for sizes that were never published")
    arguments = parser.parse_args()

    found = look(arguments.path, format_name=arguments.source, num_heads=arguments.heads)
    if arguments.verify:
        columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("read", total=bytes_to_verify(found))
            verify(found, lambda count: progress.advance(task, count))
    report = found.as_dict(tensors=arguments.tensors)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    sys.exit(2 if found.problems else 0)


def print_report(report: dict[str, Any]) -> None:
    """Print a readable report: facts, the tensors if requested, notes, problems, and a last line that says whether it is sound."""
    if "model" in report:
        for label, text in summary(report):
            print(one_line(f"{label + ':':<12}{text}"))
    else:
        print(f"{report['path']}: {report['format']}; what model it holds cannot be told")
    if "tensors" in report:
        print_tensors(report["tensors"], report["verified"])
    for kind in ("note", "problem"):
        for text in report[f"{kind}s"]:
            print(one_line(f"{kind}: {text}"))
    count = len(report["problems"])
    if count:
        rest = "" if report["verified"] else " in names and shapes; --verify reads the numbers too"
        print(f"NOT SOUND: {count} problem{'s' if count > 1 else ''}{rest}")
    elif report["verified"]:
        print("sound: every weight was read, no problems")
    else:
        print("sound in names and shapes; --verify reads the numbers too")


def summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each fact in the report."""
    model = report["model"]
    preset = f", the sizes of the published {report['preset']}" if report["preset"] else ""
    left_out = ", ".join(f"{kind} {count}" for kind, count in report["left_out"].items())
    return [
        ("path", report["path"]),
        ("format", f"{report['format']}: {report['source']}"),
        (
            "model",
            f"{model['num_layers']} layers (query layer included), hidden {model['hidden_size']}, heads {model['num_heads'] or 'unknown'}, "
            f"ffn {model['ffn_hidden_size']}, vocabulary {model['vocab_size']}, positions {model['max_positions']}{preset}",
        ),
        ("dialect", f"gelu {model['gelu']}, final norm {model['final_norm']}"),
        ("parameters", f"{report['num_parameters']:,} in {report['num_tensors']} tensors"),
        ("dtype", ", ".join(f"{name} ({count} tensors)" for name, count in report["dtypes"].items())),
        (
            "layout",
            f"{layout(report['layout'])}; {size(report['num_bytes'])} in {report['num_files']} file{'s'[: report['num_files'] != 1]}",
        ),
        ("step", "not stated" if report["step"] is None else f"{report['step']:,}"),
        ("left out", left_out or "nothing"),
        ("tokenizer", report["tokenizer"] or "none beside it"),
    ]


def layout(sizes: dict[str, int]) -> str:
    """How the source is split, in words."""
    if "ranks" in sizes:
        return f"{sizes['ranks']} MindSpore ranks"
    cut = " x ".join(f"{name} {sizes[name]}" for name in ("tensor", "pipeline", "data") if name in sizes)
    return (cut + (f", ZeRO-{sizes['zero_stage']}" if "zero_stage" in sizes else "")) or "not cut"


def size(count: int) -> str:
    """A number of bytes in a readable unit."""
    number, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:,.0f} {units[0]}" if units[0] == "bytes" else f"{number:,.1f} {units[0]}"


def print_tensors(tensors: list[dict[str, Any]], verified: bool) -> None:
    """A table of them; as wide as it must be where nobody looks at a terminal."""
    table = Table(box=None, header_style="bold")
    for column in ("tensor", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    numbers = ("minimum", "maximum", "mean", "std") if verified else ()
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for tensor in tensors:
        cells = [tensor["name"], str(tensor["shape"]), tensor["dtype"]]
        cells += ["-" if tensor.get(column) is None else f"{tensor[column]:.4g}" for column in numbers]
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(table)


if __name__ == "__main__":
    main()
