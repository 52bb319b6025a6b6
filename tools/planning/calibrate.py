"""Measure matrix products and collectives on this machine, and write them as a profile for the time model.

One process a device is started, on CPU as many as are asked for; all measure at once. Two minutes at most with the defaults.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from pangu.errors import InputError
from pangu.planner.hardware import load_cluster

START_SECONDS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `calibrate`."""
    parser.add_argument("--cluster", type=Path, required=True, metavar="YAML", help="the machine's figures; a profile holds shares of them")
    parser.add_argument("--output", type=Path, required=True, metavar="YAML", help="where to write the profile")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="devices of this machine to use (default 2)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the matrix products (default fp32)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the matrix products (default 30)")


def run(arguments: argparse.Namespace) -> None:
    """Start the processes and wait.

    Raises:
        InputError: what they refuse.
    """
    if arguments.processes < 1 or not 0 < arguments.seconds <= 3600:
        raise InputError("--processes must be 1 or more, and --seconds between 0 and 3600.")
    cluster = load_cluster(arguments.cluster)  # before anything is started
    if arguments.processes > cluster.num_devices:
        raise InputError(f"--processes {arguments.processes} is more than the {cluster.num_devices} devices of {arguments.cluster}.")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    paths = ["--cluster", str(arguments.cluster), "--output", str(arguments.output)]
    options = ["--precision", arguments.precision, "--seconds", str(arguments.seconds)]
    command = [*launcher, "-m", "pangu.planner.calibration", *paths, *options]
    limit = START_SECONDS + arguments.seconds
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launched:
        try:
            _, errors = launched.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            launched.terminate()  # the launcher then ends its processes
            raise InputError(f"the processes have not finished after {limit:.0f} s; try fewer --processes.") from None
    own = [line for line in errors.splitlines() if line.startswith(("error: ", f"{arguments.cluster}: "))]
    if launched.returncode:
        if own:
            raise InputError(own[0].removeprefix("error: "))
        raise RuntimeError(f"the measuring processes failed:\n{errors[-3000:]}")
    for line in own:
        print(line, file=sys.stderr)
    print(f"written: {arguments.output}")
