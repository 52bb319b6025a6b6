"""Errors that the user can fix, and the one place that turns errors into lines and exit codes."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
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
    """Wrap a program's `main`, so that every program ends in the same way.

    Refused input prints `error: ...` on standard error and exits 2; Ctrl-C prints one line and exits 130; a reader of the output that goes
    away, such as `head`, ends the program quietly with 141, as the signal would; an output that cannot be written, such as a full disk, is
    refused input. Other exceptions keep their traceback. Text that the terminal's encoding cannot show is escaped.
    """

    @wraps(main)
    def wrapped() -> None:
        _prepare_streams()
        try:
            try:
                main()
            except SystemExit:  # of argparse, or a program's own exit code
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except _REFUSALS as error:
            if int(os.environ.get("LOCAL_RANK", "0")) > 0:
                # All ranks are refused alike, as a rule. The first of each server says it, and the launcher ends the others meanwhile.
                time.sleep(_LAUNCHER_SECONDS)
            _leave(explain(error)[0], 2)
        except KeyboardInterrupt as interruption:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt this
            _leave(str(interruption) or "interrupted.", INTERRUPTED)
        except BrokenPipeError:
            _leave(None, BROKEN_PIPE)
        except OSError as error:
            if error.errno not in _STREAM_ERRORS or error.filename is not None:
                raise
            _leave(f"error: {_STREAM_ERRORS[error.errno]} ({error.strerror}).", 2)

    return wrapped


INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
"""Exit codes, as a shell gives them for the signals."""
_STREAM_ERRORS = {
    errno.ENOSPC: "standard output cannot be written. Free some space, or redirect it elsewhere",
    errno.EDQUOT: "standard output cannot be written. Free some space, or redirect it elsewhere",
    errno.EIO: "standard output cannot be written. Redirect it to a file",
    errno.EBADF: "standard output cannot be written. Redirect it to a file",
    errno.EMFILE: "too many open files. Raise the limit (`ulimit -n`)",
}


def _prepare_streams() -> None:
    """Make standard streams usable. One that is closed reads and writes nothing, and no file that is opened later takes its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="backslashreplace")


def _leave(message: str | None, code: int) -> None:
    """Print a last line and exit. What standard output still holds is lost if it cannot be written: nothing may fail from here on."""
    if message is not None:
        with suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
