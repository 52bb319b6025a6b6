"""Errors that are the user's to mend, and the one place that turns them into a line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from megatron_ext.topology import LayoutError


class InputError(ValueError):
    """Something the user gave is refused. The message is one line: what, where, found, expected, what to do."""


def exit_code(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a program's `main`: refused input prints `error: ...` on standard error and exits 2; other exceptions keep their traceback (exit 1)."""

    @wraps(main)
    def wrapped() -> None:
        try:
            main()
        except (InputError, LayoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
