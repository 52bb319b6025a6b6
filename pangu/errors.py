"""Errors that are the user's to mend, and the one place that turns them into a line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps

from megatron_ext.topology import LayoutError


class InputError(ValueError):
    """Something the user gave is refused. The message is one line: what, where, found, expected, what to do."""


def one_line(text: str) -> str:
    """A text that may hold names from a file, fit for a line of a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def exit_code(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a program's `main`: refused input prints `error: ...` on standard error and exits 2; other exceptions keep their traceback."""

    @wraps(main)
    def wrapped() -> None:
        try:
            main()
        except (InputError, LayoutError) as error:
            where = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
