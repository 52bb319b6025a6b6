"""Where in the program a thread is, in words: waiting for other ranks, waiting for the device, or at work."""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

from megatron_ext.collectives import ranks_of
from megatron_ext.topology import Group, Groups

# Lines of DeepSpeed's and of ours that wait for something already under way: an asynchronous collective, or the device.
_WAITS = re.compile(r"\.wait\(|synchronize\(|\.item\(|\bfloat\(")
_OURS = ("megatron_ext", "pangu")


@dataclass(frozen=True)
class Place:
    """What a thread does at this moment."""

    waiting: bool
    """For other ranks or for the device, as far as the source tells."""
    text: str
    """`all_reduce(tensor group 2,3)`, or `__getitem__ (pangu/data/indexed.py:210)`."""


def place_of(frame: FrameType | None, groups: Groups) -> Place:
    """The place of a thread, from its innermost frame.

    Nothing in the program is wrapped for this: a collective is a frame in torch.distributed or `collectives`, its group a local variable.
    """
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    calls = list(itertools.takewhile(_communicates, frames))
    if calls:
        # The first of our own functions on the way out; in somebody else's program, the function that it called.
        call = next((f for f in calls if _is_ours(f)), [f for f in calls if f.f_code.co_name != "wrapper"][-1])
        return Place(True, f"{call.f_code.co_name}({_partner(call, groups)})")
    if not frames:
        return Place(False, "no Python code")
    line = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno)
    ours = next((f for f in frames if set(PurePath(f.f_code.co_filename).parts) & set(_OURS)), frames[0])
    return Place(bool(_WAITS.search(line)), f"{ours.f_code.co_name} ({_short(ours.f_code.co_filename)}:{ours.f_lineno})")


def _is_ours(frame: FrameType) -> bool:
    return PurePath(frame.f_code.co_filename).parts[-2:] == ("megatron_ext", "collectives.py")


def _communicates(frame: FrameType) -> bool:
    return _is_ours(frame) or PurePath(frame.f_code.co_filename).parts[-3:-1] == ("torch", "distributed")


def _partner(call: FrameType, groups: Groups) -> str:
    """Whom a collective talks to, from its local variables."""
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


def _short(filename: str) -> str:
    """A path from the last package directory on; other files by name alone."""
    parts = PurePath(filename).parts
    start = next((index for index in reversed(range(len(parts))) if parts[index] in (*_OURS, "deepspeed", "torch")), len(parts) - 1)
    return "/".join(parts[start:])
