"""Describes where in the program a thread is: waiting for other ranks, waiting for the device, or computing."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

from megatron_ext.collectives import ranks_of
from megatron_ext.topology import Group, Groups

# Lines of DeepSpeed's and of ours that wait for something already under way: an asynchronous collective, or the device.
_WAITS = re.compile(r"\.wait\(|synchronize\(|\.item\(|\bfloat\(")
_OWN = frozenset({"megatron_ext"})


@dataclass(frozen=True)
class ThreadLocation:
    """What a thread is doing at one moment."""

    waiting: bool
    """Whether it waits for other ranks or for the device, as far as its source line tells."""
    text: str
    """The call, for error messages: `all_reduce(tensor group 2,3)`, or `__getitem__ (data/indexed.py:210)`."""


def thread_location(frame: FrameType | None, groups: Groups, packages: Set[str] = _OWN) -> ThreadLocation:
    """Where a thread is, from its innermost frame.

    No function of the program is wrapped for this: a collective is recognised as a frame in torch.distributed or `collectives`, and its
    group is read from a local variable of the frame.

    Args:
        frame: the innermost frame; None for a thread without Python code.
        groups: this rank's process groups, to name the group of a collective.
        packages: names of the packages whose functions are named: this one and the program's.
    """
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    calls = list(itertools.takewhile(_communicates, frames))
    if calls:
        # The first of our own functions on the way out; in somebody else's program, the function that it called.
        call = next((f for f in calls if _is_ours(f)), [f for f in calls if f.f_code.co_name != "wrapper"][-1])
        return ThreadLocation(True, f"{call.f_code.co_name}({_partner(call, groups)})")
    if not frames:
        return ThreadLocation(False, "no Python code")
    line = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno)
    ours = next(
        (f for f in frames if packages & set(_short(f, packages).split("/")) and PurePath(f.f_code.co_filename).name != "watchdog.py"),
        frames[0],
    )
    caller = "" if ours is frames[0] else f" called from {_spot(ours, packages)}"
    return ThreadLocation(bool(_WAITS.search(line)), f"{_spot(frames[0], packages)}{caller}")


def _spot(frame: FrameType, packages: Set[str]) -> str:
    return f"{frame.f_code.co_name} ({_short(frame, packages)}:{frame.f_lineno})"


def _is_ours(frame: FrameType) -> bool:
    return PurePath(frame.f_code.co_filename).parts[-2:] == ("megatron_ext", "collectives.py")


def _communicates(frame: FrameType) -> bool:
    return _is_ours(frame) or PurePath(frame.f_code.co_filename).parts[-3:-1] == ("torch", "distributed")


def _partner(call: FrameType, groups: Groups) -> str:
    """The group or rank that a collective communicates with, from its local variables."""
    variables = call.f_locals
    for function, variable, word in (("recv", "src", "from"), ("send", "dst", "to")):
        if call.f_code.co_name.endswith(function) and isinstance(variables.get(variable), int):
            return f"{word} rank {variables[variable]}"
    group = variables.get("group")
    ranks = group.ranks if isinstance(group, Group) else ranks_of(group)
    if ranks == groups.world.ranks:
        return "all ranks"
    axis = next((f"{axis} " for axis in ("tensor", "data", "pipeline") if getattr(groups, axis).ranks == ranks), "")
    return f"{axis}group {','.join(map(str, ranks))}"


def _short(frame: FrameType, packages: Set[str]) -> str:
    """A source file's path from its package on; the name alone for files of other packages."""
    parts = PurePath(frame.f_code.co_filename).parts
    begins = [index for index, part in enumerate(parts[:-1]) if part in {*packages, "deepspeed", "torch"}]
    return "/".join(parts[begins[-1] if begins else -1 :])
