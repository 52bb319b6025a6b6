"""Measure this machine for the time model: matrix products, memory, collectives, and the overhead of DeepSpeed's engines. Writes a profile.

One process per device is started, on CPU as many as requested; all measure at once. It takes two to three minutes with the defaults.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pangu.calibration.measurement import measure_training
from pangu.config.recipes import CLUSTERS
from pangu.errors import InputError
from pangu.planner.hardware import load_cluster
from pangu.planner.profile import Profile, load_profile, save_profile
from pangu.planner.search import server_devices

START_SECONDS = 300.0
CPU_CLUSTER = CLUSTERS / "cpu_gloo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `calibrate`."""
    help_cluster = "the machine's figures, which the profile is relative to (default: cpu_gloo.yaml)"
    parser.add_argument("--cluster", type=Path, default=CPU_CLUSTER, metavar="YAML", help=help_cluster)
    parser.add_argument("--output", type=Path, required=True, metavar="YAML", help="where to write the profile")
    parser.add_argument("--processes", type=int, metavar="N", help="devices of this machine to use (default: a server of the cluster)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="precision of the matrix products (default fp32)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds to spend on the matrix products (default 30)")


def run(arguments: argparse.Namespace) -> None:
    """Start the processes and wait.

    Raises:
        InputError: if an option is refused or a process fails.
    """
    if (arguments.processes is not None and arguments.processes < 1) or not 0 < arguments.seconds <= 3600:
        raise InputError("--processes must be 1 or more, and --seconds between 0 and 3600.")
    cluster = load_cluster(arguments.cluster)  # before anything is started
    processes = arguments.processes or server_devices(cluster)
    if processes > cluster.num_devices:
        raise InputError(f"--processes {processes} is more than the {cluster.num_devices} devices of {arguments.cluster}.")
    if not arguments.output.parent.is_dir():
        raise InputError(f"--output {arguments.output}: there is no folder {arguments.output.parent}. Create it, or name another file.")
    with tempfile.TemporaryDirectory() as folder:
        profile = _measured(arguments, processes, Path(folder) / "profile.yaml")
    save_profile(measure_training(profile, cluster, arguments.precision, processes), arguments.output)
    print(f"written: {arguments.output}")


def _measured(arguments: argparse.Namespace, processes: int, path: Path) -> Profile:
    """Start processes that measure this machine, all at once, and read the profile that they write."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = ["--cluster", str(arguments.cluster), "--output", str(path)]
    options = ["--precision", arguments.precision, "--seconds", str(arguments.seconds)]
    command = [*launcher, "-m", "pangu.calibration.measurement", *paths, *options]
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
    return load_profile(path)
