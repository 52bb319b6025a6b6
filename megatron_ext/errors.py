"""Errors that the person who starts a run can fix, and a readable form of lists of ranks."""

from __future__ import annotations

from collections.abc import Sequence


class LayoutError(ValueError):
    """A layout that cannot run: sizes that do not multiply or divide as they must."""


class RendezvousError(Exception):
    """The ranks of a run did not find each other: one is missing, an address or a port is wrong, or two have the same number."""


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-3,5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    numbers = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}"
