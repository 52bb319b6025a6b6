"""Errors that are the user's to mend, and the one place that turns them into a line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps

from megatron_ext.topology import LayoutError

MAX_LINE = 3000
"""Characters of a message, many more than any needs; names and values that it quotes from a file may be of any length."""


class InputError(ValueError):
    """Something the user gave is refused. The message is one line: what, where, found, expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text that quotes a file, fit for a terminal: no newlines, escape sequences or halves of characters, and not endless."""

    def shortened(text: str) -> str:
        return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2 - 5]} ... {text[-MAX_LINE // 2 :]}"

    return shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shortened(text)))


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
