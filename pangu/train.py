"""Train PanGu-α.

    python -m pangu.train --config ds_configs/quickstart.yaml [section.key=value ...]
    torchrun --nproc-per-node 4 -m pangu.train --config ds_configs/quickstart.yaml parallel.tensor=2 parallel.pipeline=2
    deepspeed --log_level warning --num_gpus 4 --module pangu.train --config ds_configs/quickstart.yaml parallel.tensor=2
    python -m pangu.train --dry-run --config ds_configs/200B.yaml --world-size 2048
    python -m pangu.train --print-config --config ds_configs/quickstart.yaml optimizer.lr=1e-3

Start the same command again after an interruption: it continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

from pangu.config import load_config
from pangu.config.layout import resolve
from pangu.config.load import nearest_keys
from pangu.errors import InputError, exit_code


@exit_code
def main() -> None:
    """Parse the command line and train, or only print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m pangu.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, help="a recipe, such as ds_configs/quickstart.yaml")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe, print layout, rank map, parameters and memory per rank, and exit; allocates nothing",
    )
    instead.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML, and exit; starts nothing")
    parser.add_argument("--world-size", type=int, help="number of processes that --dry-run assumes (default 1)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    arguments, unknown = parser.parse_known_intermixed_args()
    if options := [word for word in unknown if word.startswith("-")]:
        option = options[0].partition("=")[0]
        raise InputError(
            f"{option}: unknown option; --help lists them. Settings are written section.key=value. "
            f"Nearest: {', '.join(nearest_keys(option))}."
        )
    if arguments.world_size is not None and not arguments.dry_run:
        raise InputError(
            "--world-size goes with --dry-run; a real run has as many processes as its launcher starts (torchrun --nproc-per-node N)."
        )
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(config.to_yaml(), end="")
        return
    if arguments.dry_run:
        from rich.console import Console

        from pangu.training.overview import print_report

        print_report(config, resolve(config, arguments.world_size or 1), Console(soft_wrap=True, highlight=False))
        return
    # Refuse before the slow imports and before any process talks to another.
    layout = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    # torch logs each connection that a failed rank closes, with a page of C++ frames; we say which rank failed. Read at its import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pangu.training.run import run_training

    run_training(config, layout)
    # The engine is full of cycles that hold process groups. Left to the interpreter's end, their threads may abort the process.
    gc.collect()


if __name__ == "__main__":
    main()
