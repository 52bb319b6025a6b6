"""Measure what this project promises about speed and memory, on this machine, next to a peer that does the same job.

    python tools/benchmark.py convert --preset 2.6B --workdir /mnt/disk
    python tools/benchmark.py convert --preset 350M --layers 4 --json
    python tools/benchmark.py generate --batch 8
    python tools/benchmark.py score
    python tools/benchmark.py train
    python tools/benchmark.py layouts --only tensor
    python tools/benchmark.py growth --chart growth.png
    python tools/benchmark.py tokenize --tokenizer tokenizer/ --text corpus.txt
    python tools/benchmark.py preprocess --workers 8
    python tools/benchmark.py data
    python tools/benchmark.py startup

prints a table, or with --json one object of this form:

    {"task": ..., "device": ..., "ours": {METRIC: value}, "peers": {PEER: {METRIC: value}}, "ratios": {PEER: {METRIC: value}}}

A value is a number. Where a job is done in several ways, a metric is named "METRIC, WAY": "peak_bytes, ZeRO-1". A ratio has the name of the
metric of ours, and compares it with that metric of the peer, or with the peer's METRIC if the peer has one way only; above 1 means that
this project is better. `all_METRIC` has every turn's value, in a list, and `all_ratios` those of a ratio. `peers` and `ratios` are empty
where nothing is compared. Other keys say what was measured. What is being done goes to standard error.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from pangu.benchmarks import convert, data, generate, growth, layouts, preprocess, score, startup, tokenize, train
from pangu.benchmarks.machine import describe
from pangu.errors import exit_code

TASKS = {
    "convert": convert,
    "generate": generate,
    "score": score,
    "tokenize": tokenize,
    "preprocess": preprocess,
    "data": data,
    "startup": startup,
    "train": train,
    "layouts": layouts,
    "growth": growth,
}
"""Each is a module with `add_arguments(parser)`, `measure(arguments)`, which gives `ours`, `peers` and `ratios`, and `table(result)`."""


@exit_code
def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        summary, _, rest = (task.__doc__ or "").partition("\n")
        own = tasks.add_parser(
            name, help=summary, description=summary + rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        task.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    result = {"task": arguments.task, "device": describe(), **TASKS[arguments.task].measure(arguments)}
    if arguments.json:
        print(json.dumps(result))
    else:
        Console().print(TASKS[arguments.task].table(result))


if __name__ == "__main__":
    main()
