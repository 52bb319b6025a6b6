"""Ends a run that hangs, with an explanation, and ends all ranks at the first failure of any of them.

Every rank reports progress (`beat`), which costs one assignment. A rank that sees no progress on any rank for the timeout raises an alarm
in the key-value store that the ranks share since their rendezvous. A thread of every other rank waits there: it writes its stacks to a
file, reports where its main thread is, and ends its process once the rank that raised the alarm has printed what it learned. A rank that
does not answer is stopped or dead.

An exception is handled the same way: the first rank that raises the alarm prints it, and the others end with a line about that rank instead
of with the errors that it caused in them.

No thread here calls the device or a collective, so that they work whatever the main thread waits for. Each call to the store is made on a
thread that may never return, since the process that serves the store may be the one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from megatron_ext.accelerator import is_communication_error
from megatron_ext.errors import ranks_in_words
from megatron_ext.supervision.rendezvous import Rendezvous
from megatron_ext.supervision.thread_location import ThreadLocation, thread_location
from megatron_ext.topology import Groups

HANG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: starting again may help."""

_ANSWER_SECONDS = 5.0
"""Seconds to wait for the answers of the other ranks. Only ranks that cannot answer take that long."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Watchdog:
    """A context manager that watches this rank and the others.

    Leaving it with an exception ends the process, which would otherwise wait for the others in some destructor. A process that runs alone
    leaves it normally.

    Args:
        rendezvous: how the ranks of this run found each other.
        groups: this rank's process groups, used only to name groups and ranks.
        folder: stacks are written to `hang-STEP/` in it. Every rank must be able to write there.
        timeout_seconds: how long the main thread may take from one beat to the next; 0 = forever.
        explain: turns an exception into the text to print and the exit code. If that is 1, a fault, the other ranks print why they stop.
        packages: names of the packages whose functions are named in the location of a thread: this package and the program's.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        groups: Groups,
        folder: Path,
        timeout_seconds: float,
        explain: Callable[[BaseException], tuple[str, int]],
        packages: Set[str] = frozenset({"megatron_ext"}),
    ) -> None:
        self._packages = packages
        self._rendezvous, self._groups, self._folder, self._timeout, self._explain = rendezvous, groups, folder, timeout_seconds, explain
        self._beat: tuple[int, str] = (0, "starting")
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._telling = threading.Lock()  # held by the one thread that explains this rank's end

    def __enter__(self) -> Watchdog:
        for target in (self._listen, self._watch) if self._timeout else (self._listen,):
            thread = threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if error is not None and self._groups.world.size > 1:
            self._fail(error)
        # A thread that is still in torch's C++ when the interpreter ends aborts the process. So the listeners are called off.
        _within(_ANSWER_SECONDS, lambda: self._rendezvous.connect().set("alarm", json.dumps({"rank": self._rendezvous.rank, "over": True})))
        for thread in self._threads:
            thread.join(_ANSWER_SECONDS)

    def beat(self, step: int, what: str) -> None:
        """Report progress of this rank.

        Args:
            step: the optimizer step being executed.
            what: what the rank does next, such as `training` or `saving`.
        """
        self._beat = (step, what)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items through; each one that is taken is reported as progress."""
        for item in items:
            step, what = self._beat
            self._beat = (step, what)  # another object, which is all that counts
            yield item

    # What this rank notices itself

    def _watch(self) -> None:
        period = self._timeout / 20
        store = _within(_ANSWER_SECONDS, self._rendezvous.connect)
        idle, due, unsaid, beats = 0.0, 0.0, False, 0
        seen, before = self._beat, time.monotonic()
        while not self._ended.wait(min(1.0, period)):
            beat, now = self._beat, time.monotonic()
            # Time in which this thread did not run either does not count: the whole run was suspended for a while.
            idle += min(now - before, 2 * min(1.0, period))
            if beat is not seen:
                idle, unsaid = 0.0, True
            seen, before = beat, now
            if store is not None and now >= due:
                # A rank may wait for long while another makes progress, such as when weights are written. So every rank's beats count.
                counted = _within(_ANSWER_SECONDS, partial(store.add, "beats", int(unsaid)))
                if counted is None:
                    store, before = None, time.monotonic()
                    idle += before - now
                elif counted != beats:
                    idle, beats = 0.0, counted
                due, unsaid = now + period, False
            if idle >= self._timeout:
                self._hang(*beat)

    def _hang(self, step: int, what: str) -> None:
        if not self._telling.acquire(blocking=False):
            return  # another thread is ending this process
        first = self._raise_alarm({"step": step, "hang": True, "code": HANG_EXIT_CODE})
        if first is False:
            self._yield_to_listener(HANG_EXIT_CODE)
        here = self._write_stacks(step)
        answers = self._collect_answers() if first else {}
        silent = self._silent(answers, store_answers=bool(first))
        for rank, state in silent.items():
            self._write_for(rank, state, step)
        if first or self._claim(step):
            places = {rank: ThreadLocation(**answer) for rank, answer in answers.items()} | {self._rendezvous.rank: here}
            story = tell_hang(places, silent, lambda rank: _label(rank, self._groups), f"step {step} ({what})", self._timeout)
            print(f"error: {story}. Stacks of all ranks: {self._stacks(step)}/.", file=sys.stderr, flush=True)
        if first:
            _within(1.0, lambda: self._rendezvous.connect().set("told", "1"))
        _leave(HANG_EXIT_CODE)

    def _fail(self, error: BaseException) -> NoReturn:
        if not self._telling.acquire(timeout=2 * _ANSWER_SECONDS):
            _leave(1)
        text, code = self._explain(error)
        lost_contact = is_communication_error(error)
        first = self._raise_alarm({"step": self._beat[0], "hang": False, "code": code})
        if first is False:
            self._yield_to_listener(code)
        if not lost_contact:
            print(text, file=sys.stderr, flush=True)
        answers = self._collect_answers() if first else {}
        if lost_contact:
            silent = self._silent(answers, store_answers=bool(first))
            who = " and ".join(f"{_label(rank, self._groups)}, which {state}" for rank, state in silent.items())
            print(f"error: rank {self._rendezvous.rank} lost {who}" if silent else text, file=sys.stderr, flush=True)
        _leave(code)

    def _yield_to_listener(self, code: int) -> NoReturn:
        """Another rank was first: the listener is notified and ends this process, unless the store is lost in the meantime."""
        self._telling.release()
        time.sleep(2 * _ANSWER_SECONDS)
        _leave(code)

    # What another rank has noticed

    def _listen(self) -> None:
        try:
            store = self._rendezvous.connect()
            store.wait(["alarm"], timedelta(days=365))
            alarm = json.loads(store.get("alarm"))
        except RuntimeError:
            return  # the store is gone, and with it all who could be heard there
        if alarm["rank"] == self._rendezvous.rank or "over" in alarm:
            return
        self._telling.acquire()
        here = self._write_stacks(alarm["step"]) if alarm["hang"] else self._here()
        try:
            store.set(f"answers/{self._rendezvous.rank}", json.dumps(vars(here)))
            if alarm["hang"]:
                store.wait(["told"], timedelta(seconds=2 * _ANSWER_SECONDS))
            else:
                time.sleep(0.5)  # the rank that failed ends first: launchers name the first that they see
        except RuntimeError:
            pass  # the rank that served the store has told and gone
        if alarm["code"] == 1:
            print(f"rank {self._rendezvous.rank}: stopped because rank {alarm['rank']} failed", file=sys.stderr, flush=True)
        _leave(alarm["code"])

    # The store

    def _raise_alarm(self, alarm: dict[str, Any]) -> bool | None:
        """Whether this rank is the first to raise one; None if the store does not answer."""

        def attempt() -> bool:
            store = self._rendezvous.connect()
            if store.add("alarms", 1) > 1:
                return False
            store.set("alarm", json.dumps({"rank": self._rendezvous.rank, **alarm}))
            return True

        return _within(_ANSWER_SECONDS, attempt)

    def _collect_answers(self) -> dict[int, dict[str, Any]]:
        """Where the other ranks report their main threads to be, by rank."""
        answers: dict[int, dict[str, Any]] = {}

        def collect() -> None:
            store = self._rendezvous.connect()
            missing = [rank for rank in self._groups.world.ranks if rank != self._rendezvous.rank]
            while missing:
                for rank in [rank for rank in missing if store.check([f"answers/{rank}"])]:
                    answers[rank] = json.loads(store.get(f"answers/{rank}"))
                    missing.remove(rank)
                time.sleep(0.05)

        _within(_ANSWER_SECONDS, collect)
        return dict(answers)

    def _silent(self, answers: Mapping[int, Any], *, store_answers: bool) -> dict[int, str]:
        """The ranks that did not answer, and their states. Without the store only the rank that serves it is known to be silent."""
        if store_answers:
            silent = [rank for rank in self._groups.world.ranks if rank != self._rendezvous.rank and rank not in answers]
        else:
            silent = [0] if self._rendezvous.server == "rank 0" else []
        return {rank: _state(*self._rendezvous.members[rank]) for rank in silent}

    # Stacks

    def _stacks(self, step: int) -> Path:
        return self._folder / f"hang-{step}"

    def _here(self) -> ThreadLocation:
        return thread_location(sys._current_frames().get(self._main), self._groups, self._packages)

    def _write_stacks(self, step: int) -> ThreadLocation:
        """Write this rank's stacks; returns where its main thread is."""
        here, path = self._here(), self._stacks(step) / f"rank_{self._rendezvous.rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                at_step, what = self._beat
                file.write(f"{_label(self._rendezvous.rank, self._groups)}, step {at_step}, {what}: {_verb(here)} {here.text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"rank {self._rendezvous.rank}: {path} cannot be written ({error}); its stacks:", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return here

    def _write_for(self, rank: int, state: str, step: int) -> None:
        """A rank that cannot write its stacks gets a file that says so."""
        host, process = self._rendezvous.members[rank]
        text = f"{_label(rank, self._groups)} {state} and wrote no stacks. If it lives: py-spy dump --native --pid {process}, on {host}.\n"
        try:
            (self._stacks(step) / f"rank_{rank:05d}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"{text} ({error})", file=sys.stderr)

    def _claim(self, step: int) -> bool:
        """Without a store: whether this rank is the first that wants to print the explanation."""
        try:
            (self._stacks(step) / f"told-{self._rendezvous.members[0][1]}").touch(exist_ok=False)  # once in this start
        except FileExistsError:
            return False
        except OSError:
            pass
        return True


def tell_hang(
    places: Mapping[int, ThreadLocation], silent: Mapping[int, str], label: Callable[[int], str], what: str, seconds: float
) -> str:
    """One sentence about a hang: which ranks are to blame, as far as can be known, and where the others wait.

    Blamed are the ranks that do not answer; otherwise those that compute while others wait; otherwise no rank in particular.

    Args:
        places: where the ranks that answered are.
        silent: states of the ranks that did not answer, such as `is stopped`.
        label: formats a rank with its coordinates.
        what: the step and what was being done.
        seconds: how long there was no progress.
    """
    at_work = [rank for rank, place in places.items() if not place.waiting]
    blamed = sorted(silent) or (at_work if len(at_work) < len(places) else []) or sorted(places)
    named = " and ".join(map(label, blamed)) if len(blamed) <= 3 else ranks_in_words(blamed)
    have = "has" if len(blamed) == 1 else "have"
    doing = [f"it {silent[rank]}" if len(blamed) == 1 else f"rank {rank} {silent[rank]}" for rank in sorted(silent)]
    by_place: dict[tuple[bool, str], list[int]] = {}
    for rank in sorted(places, key=lambda rank: (rank not in blamed, rank)):
        by_place.setdefault((places[rank].waiting, places[rank].text), []).append(rank)
    for (waiting, text), ranks in by_place.items():
        who = "it" if ranks == blamed and len(ranks) == 1 else ranks_in_words(ranks)
        verb = ("waits in" if waiting else "is in") if len(ranks) == 1 else ("wait in" if waiting else "are in")
        doing.append(f"{who} {verb} {text}")
    return f"{named} {have} made no progress in {what} for {seconds:g} s; {', '.join(doing)}"


def _verb(place: ThreadLocation) -> str:
    return "waits in" if place.waiting else "is in"


def _label(rank: int, groups: Groups) -> str:
    place = groups.topology.coordinates(rank)
    return f"rank {rank} (pipe {place.pipe}, data {place.data}, tensor {place.tensor})"


def _state(host: str, process: int) -> str:
    """The state of a process that does not answer, for error messages."""
    if host != socket.gethostname():
        return f"does not answer: stopped, dead or cut off (process {process} on {host})"
    try:
        letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"is dead (process {process})"
    if letter in "Tt":
        return f"is stopped (process {process}; SIGCONT lets it go on)"
    if letter in "ZX":
        return f"is dead (process {process})"
    return f"runs but does not answer (process {process}, state {letter})"


def _within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """The result of an action that may never return; None if it did not return in time or could not reach the other side."""
    results: list[Result] = []

    def act() -> None:
        try:
            results.append(action())
        except RuntimeError:  # the errors of torch's stores
            return

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _leave(code: int) -> NoReturn:
    """End the process now: destructors of process groups wait for ranks that no longer answer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
