"""Profiles some steps of a run with torch's profiler (`train.profile`).

Each rank writes run.dir/profile/rank-N.json.gz, a trace for chrome://tracing and ui.perfetto.dev, and rank-N.txt, a table of the
operators that took most time.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ext import accelerator
from pangu.files import publish, remove

ROWS = 40


class StepProfile:
    """Records a range of steps. A context manager: on exit it writes what was recorded, also if the run ends early.

    A full disk does not end the run: the rank prints a warning and continues without the profile.

    Args:
        steps: the steps to record, numbered as in metrics.jsonl; an empty range costs nothing.
        directory: output directory; it is created if it does not exist.
        rank: global rank, part of the file names.
    """

    def __init__(self, steps: range, directory: Path, rank: int) -> None:
        self._steps, self._directory, self._rank = steps, directory, rank
        self._profiler: Any = None
        self._recorded: list[int] = []

    def step(self, number: int) -> AbstractContextManager[None]:
        """A context that records its block if the step is in the range, and writes the files after the last step."""
        return self._record(number) if self._steps else contextlib.nullcontext()

    @contextlib.contextmanager
    def _record(self, number: int) -> Iterator[None]:
        if number not in self._steps:
            self._finish()  # a return to a checkpoint has led out of the range
            yield
            return
        from torch.profiler import profile, record_function

        if self._profiler is None:
            self._profiler = profile(activities=accelerator.profiler_activities())
            self._profiler.start()
        with record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number == self._steps[-1]:
            self._finish()

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()

    def _finish(self) -> None:
        """Write what was recorded, once."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._steps = self._profiler, None, range(0)
        began = time.perf_counter()
        profiler.stop()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Not a hidden suffix: torch compresses what is named .gz.
            self._write("json.gz", lambda partial: profiler.export_chrome_trace(str(partial)))
            self._write("txt", lambda partial: partial.write_text(self._table(profiler), encoding="utf-8"))
        except OSError as error:
            print(
                f"warning: rank {self._rank}: {self._directory}: the profile could not be written ({error.strerror or error}); training "
                "continues without it.",
                file=sys.stderr,
                flush=True,
            )
            return
        if self._rank == 0:
            seconds = time.perf_counter() - began
            print(f"profile of {self._span()} in {self._directory}, written in {seconds:.1f} s", flush=True)

    def _write(self, suffix: str, write: Any) -> None:
        final = self._directory / f"rank-{self._rank}.{suffix}"
        partial = self._directory / f"partial-{secrets.token_hex(4)}-{final.name}"  # torch looks at the end of the name
        try:
            write(partial)
            publish(partial, final)
        finally:
            remove(partial)

    def _table(self, profiler: Any) -> str:
        operators = profiler.key_averages()
        on_device = any(operator.self_device_time_total for operator in operators)
        key = "self_device_time_total" if on_device else "self_cpu_time_total"
        return f"rank {self._rank}, {self._span()}\n{operators.table(sort_by=key, row_limit=ROWS, max_name_column_width=80)}\n"

    def _span(self) -> str:
        return f"steps {self._recorded[0]} to {self._recorded[-1]}" if self._recorded else "no whole step"
