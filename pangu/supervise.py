"""Restart a training command when it crashes, for launchers that do not.

    python tools/supervise.py -- deepspeed --log_level warning --num_gpus 8 --module pangu.train --config ds_configs/350M.yaml
    python tools/supervise.py --max-restarts 5 -- python -m pangu.train --config ds_configs/quickstart.yaml

A crash is any exit code except 0 (done, or saved after a signal) and 2 (refused input). The run continues from its newest checkpoint. After
--max-restarts restarts in a row without a newer checkpoint it gives up, with the command's exit code. SIGTERM, SIGINT and SIGUSR1 are
passed on, and after the first two nothing is restarted. torchrun restarts by itself, with its own --max-restarts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from pangu.config import load_config
from pangu.errors import InputError, exit_code

LEFT_OVER_SECONDS = 60.0
"""Seconds that processes of an ended command may continue, for instance to save, before they are killed."""


@exit_code
def main() -> None:
    """Parse the command line and run the command until it is not to be restarted."""
    parser = argparse.ArgumentParser(
        prog="python tools/supervise.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="restarts in a row without a new checkpoint (default 3)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="a training command, launcher included")
    arguments = parser.parse_args()
    sys.exit(supervise(arguments.command, _checkpoints_of(arguments.command), arguments.max_restarts))


def supervise(command: list[str], checkpoints: Path, max_restarts: int) -> int:
    """Run `command`, restart it when it crashes as long as it makes progress, and return its last exit code."""
    child: subprocess.Popen[bytes] | None = None
    told_to_stop = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = told_to_stop or number != signal.SIGUSR1
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    restarts, newest = 0, _newest(checkpoints)
    while True:
        # A session of its own: a terminal's Ctrl-C reaches it through `pass_on` only, and what the command leaves behind can be found.
        child = subprocess.Popen(command, start_new_session=True)
        code = child.wait()
        _end_left_over(child.pid)
        code = 128 - code if code < 0 else code
        if code in (0, 2) or told_to_stop:
            return code
        before, newest = newest, _newest(checkpoints)
        restarts = restarts if newest == before else 0
        if restarts == max_restarts:
            print(
                f"supervise: exit code {code}; given up after {max_restarts} restarts without a new checkpoint", file=sys.stderr, flush=True
            )
            return code
        restarts += 1
        print(f"supervise: exit code {code}; starting again from {newest or 'the beginning'}", file=sys.stderr, flush=True)


def _checkpoints_of(command: list[str]) -> Path:
    """The checkpoint directory of a training command."""
    recipes = [value for option, value in itertools.pairwise(command) if option == "--config"]
    if len(recipes) != 1:
        raise InputError(f"{' '.join(command)}: it has no `--config FILE`, so its checkpoints cannot be found.")
    return load_config(Path(recipes[0]), [word for word in command if re.match(r"\w+(\.\w+)?=", word)]).checkpoint_dir


def _newest(checkpoints: Path) -> str:
    try:
        return (checkpoints / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _end_left_over(session: int) -> None:
    """Wait for the processes of an ended command: they would write into the same run as the next."""
    deadline = time.monotonic() + LEFT_OVER_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(session, 0)
            time.sleep(0.2)
        os.killpg(session, signal.SIGKILL)


if __name__ == "__main__":
    main()
