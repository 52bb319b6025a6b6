"""The machine in words, and what a program took of it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pangu.benchmarks.harness import cores
from pangu.errors import InputError


def describe() -> str:
    """Processor, cores this process may use, and memory."""
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        models = []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{models[0] if models else 'CPU'}, {cores()} cores, {memory / 2**30:.0f} GiB"


def run(words: Sequence[object], what: str, **environment: str) -> tuple[str, float]:
    """Run python with these words; its standard output, and the seconds it took, start and imports counted.

    Raises:
        InputError: if `what` it does fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{what} failed: {last_line(done.stderr)}")
    return done.stdout, time.perf_counter() - began


def call(function: str, *words: object) -> list[str]:
    """Words for python to call a function, named with its module, in a process of its own."""
    module, _, name = function.rpartition(".")
    script = f"import sys; sys.path[:0] = {sys.path!r}; from {module} import {name}; {name}(*sys.argv[1:])"
    return ["-c", script, *map(str, words)]


def last_line(errors: str) -> str:
    """The last thing that a program said of its failure."""
    return (errors.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")


@dataclass(frozen=True)
class Usage:
    """What a program took from its start to its end."""

    seconds: float
    peak_bytes: int
    """Most memory it had resident, pages of mapped files included: `VmHWM`, a mark that the kernel keeps."""
    anonymous_bytes: int
    """Most memory of its own, without pages of files, which the kernel may take back: the highest `RssAnon` that was seen."""
    family_bytes: int
    """Most memory that it and the processes it started had together, a page that several share counted once; 0 unless asked for."""
    exit_code: int
    errors: str
    """Its standard error."""


def watch(command: Sequence[object], *, family: bool = False) -> Usage:
    """Run a program, given in words and paths, and look at its memory a hundred times a second; at its `family`'s, four times.

    `getrusage` is not asked: a child's `ru_maxrss` begins with what its parent had when it started it.

    Raises:
        InputError: where there is no /proc.
    """
    if not Path("/proc/self/status").is_file():
        raise InputError("memory is measured with /proc, which this system has not. Run it on Linux.")
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = anonymous = together = 0
    next_look = began
    try:
        while process.returncode is None:
            seen = memory(process.pid)
            peak, anonymous = max(peak, seen.get("VmHWM", 0)), max(anonymous, seen.get("RssAnon", 0))
            if family and time.perf_counter() >= next_look:  # the kernel walks through all pages for it
                together = max(together, sum(map(_proportional, _descendants(process.pid))))
                next_look = time.perf_counter() + 0.25
            try:
                process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - began
        assert process.stderr is not None
        return Usage(seconds, peak, anonymous, together, process.returncode, process.stderr.read())
    finally:
        process.kill()
        process.wait()


def memory(process: int | str = "self") -> dict[str, int]:
    """The sizes in a process's /proc/PID/status by name, in bytes; none once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}


def _descendants(process: int) -> list[int]:
    """A process and those it started, and theirs."""
    found = [process]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has just ended
                found += map(int, children.read_text(encoding="utf-8").split())
    return found


def _proportional(process: int) -> int:
    """Bytes of memory a process has, its part of what it shares with others: the kernel's Pss."""
    try:
        pages = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(size) * 1024 for size in re.findall(r"^Pss:\s+(\d+) kB$", pages, re.MULTILINE))
