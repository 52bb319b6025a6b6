"""Signals and a lost launcher, in a process of their own, for a test's own handlers must stay; under launchers: tests/faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.training.stopping import _launchers

ROOT = Path(__file__).resolve().parents[3]
WAIT = """
import os, signal, sys, time
from pangu.training import stopping
stopping._ONE_KEYSTROKE_SECONDS = {keystroke}
request = stopping.StopRequest()
def told():
    until = time.monotonic() + 20
    while not request.received and time.monotonic() < until:
        time.sleep(0.01)
    return request.received
"""


def run(code: str, keystroke: float = 0.05) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WAIT.format(keystroke=keystroke) + code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"RANK": "3"})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_one_signal_is_noted_and_ends_nothing(name: str) -> None:
    done = run(f"assert not request.received; os.kill(os.getpid(), signal.{name}); print(signal.Signals(told()).name)")
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


def test_the_same_signal_again_ends_the_process_even_where_no_python_runs() -> None:
    """The main thread joins a thread that never ends, as it does in a collective that another rank does not join."""
    done = run(
        "import threading; os.kill(os.getpid(), 15); told(); time.sleep(0.2); os.kill(os.getpid(), 15); threading.Event().wait(20)\n"
        "print('still here')"
    )
    assert (done.returncode, done.stdout) == (128 + 15, "")
    assert done.stderr == "rank 3: SIGTERM again: ended without saving\n"


def test_a_signal_that_comes_twice_at_once_or_another_one_is_one_request() -> None:
    code = "os.kill(os.getpid(), 15); told(); os.kill(os.getpid(), {second}); time.sleep(0.5); print('alive')"
    assert run(code.format(second=15), keystroke=30).stdout == "alive\n"
    assert run(code.format(second=2)).stdout == "alive\n"


def test_no_launcher_is_above_this_test() -> None:
    """Or its end would be taken for theirs; under torchrun and deepspeed: tests/faults/test_supervision.py."""
    assert _launchers() == []
