"""Errors that the user can fix, and the one place that turns errors into lines and exit codes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps

from megatron_ext.errors import LayoutError, RendezvousError

MAX_LINE = 3000
"""Largest length of a message in characters, more than any needs; what it quotes from a file may be of any length."""
_LAUNCHER_SECONDS = 3.0


class InputError(ValueError):
    """An input is refused. The message is one line: what, where, found, expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


_REFUSALS = (InputError, LayoutError, RendezvousError)


def explain(error: BaseException) -> tuple[str, int]:
    """The text to print for an error, and the exit code: one line and 2 for refused input, the traceback and 1 for any other."""
    if isinstance(error, _REFUSALS):
        return f"error: {error}", 2
    rank = f"rank {os.environ['RANK']} failed:\n" if "RANK" in os.environ else ""
    return f"{rank}{''.join(traceback.format_exception(error)).rstrip()}", 1


def one_line(text: str) -> str:
    """Make text that quotes a file safe for a terminal: no newlines, escape sequences or lone surrogates, and a limited length."""

    def shortened(text: str) -> str:
        return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2 - 5]} ... {text[-MAX_LINE // 2 :]}"

    return shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shortened(text)))


def exit_code(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a program's `main`: refused input prints `error: ...` on standard error and exits 2; other exceptions keep their traceback."""

    @wraps(main)
    def wrapped() -> None:
        try:
            main()
        except _REFUSALS as error:
            if int(os.environ.get("LOCAL_RANK", "0")) > 0:
                # All ranks are refused alike, as a rule. The first of each server says it, and the launcher ends the others meanwhile.
                time.sleep(_LAUNCHER_SECONDS)
            print(explain(error)[0], file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
