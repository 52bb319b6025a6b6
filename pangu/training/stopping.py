"""Requests to stop: signals to any rank, and the death of the launcher."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path, PurePath

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHERS = {"torchrun", "torch.distributed.run", "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
_ONE_KEYSTROKE_SECONDS = 1.0


class StopRequest:
    """Records SIGTERM, SIGINT, SIGUSR1 and the death of the launcher, so that the loop can save and exit between two steps.

    The same signal a second time ends the process at once, even where the main thread waits for another rank and runs no Python: the
    interpreter's handler writes each signal to a pipe, which a thread reads. Another signal does not, for launchers pass on an interrupt
    and then terminate; nor does a second within a second, for a terminal and a launcher may both deliver the first.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the received signal, or None; the death of the launcher counts as SIGTERM."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="stop request", daemon=True).start()

    def _read(self, reader: int) -> None:
        launchers = _launchers()
        first: dict[int, float] = {}
        while True:
            if select.select([reader], [], [], 1.0)[0]:
                for number in os.read(reader, 16):
                    now = time.monotonic()
                    if now - first.setdefault(number, now) > _ONE_KEYSTROKE_SECONDS:
                        name = signal.Signals(number).name
                        print(f"rank {os.environ.get('RANK', '0')}: {name} again: ended without saving", file=sys.stderr, flush=True)
                        os._exit(128 + number)
                    self.received = number if number in SIGNALS else self.received
            elif not self.received and launchers != _launchers():
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print("the launcher has gone: saving", file=sys.stderr, flush=True)
                self.received = signal.SIGTERM


def _launchers() -> list[int]:
    """Process ids of the launchers among this process's ancestors, the nearest first; empty under a shell or a batch system."""
    found: list[int] = []
    process = os.getppid()
    while True:
        try:
            words = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
            is_python = PurePath(words[0]).name.startswith("python")
            program = next((word for word in words[is_python:] if not word.startswith("-")), "")
            if PurePath(program).name not in _LAUNCHERS:
                return found
            found.append(process)
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return found
