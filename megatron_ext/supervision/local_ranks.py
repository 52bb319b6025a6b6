"""Runs one function on N processes of this machine that form a torch.distributed world.

With a fork server that has torch loaded a rank starts in milliseconds. A world that outlasts its timeout, or one rank of which fails, is
killed as a group; the error holds the failed rank's traceback or every rank's stack.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class RankError(RuntimeError):
    """A rank failed, or the world did not end in time."""

    def __init__(self, message: str, *, rank: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        """The rank that failed; None after a timeout."""
        self.reason = reason
        """The exception's type and text, empty where there was none: the process was killed, or the time was up."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float,
    preload: Sequence[str] = (),
    start_method: str = "forkserver",
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh world and return what each returned, in rank order.

    Args:
        function: defined at the top of a module. Its environment has the variables of `rank_environment`. It returns plain values: torch
            sends a tensor as memory of the process that has it, which ends.
        world_size: number of processes.
        args: must pickle.
        timeout: seconds until the group is killed.
        preload: modules that the fork server imports before it forks.
        start_method: of multiprocessing; `spawn` where a parent that has touched a device must not be forked.

    Raises:
        RankError: with the first failing rank's traceback, or every rank's stack after a timeout.
    """
    context: Any = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(list(preload))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / f"rank{rank}.txt" for rank in range(world_size)]
        processes: list[Any] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                place = rank_environment(rank, world_size, port)
                processes.append(context.Process(target=_rank_main, args=(function, args, place, str(stacks[rank]), sender), daemon=True))
                processes[-1].start()
                sender.close()
                pipes.append(receiver)
            return _collect(pipes, processes, stacks, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables from which a rank of a world on this machine finds its place, as torchrun sets them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(pipes: list[Connection], processes: list[Any], stacks: list[Path], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting: list[Any] = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready: list[Any] = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1.0)
            shown = "\n".join(f"--- rank {rank} ---\n{path.read_text() if path.exists() else ''}" for rank, path in enumerate(stacks))
            raise RankError(f"no end after {timeout:.0f} s; ranks {sorted(set(range(len(pipes))) - set(results))} still run:\n{shown}")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                reason, value = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}", rank=rank) from None
            if reason:
                raise RankError(f"rank {rank} failed:\n{value}", rank=rank, reason=reason)
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(function: Callable[..., Any], args: tuple[Any, ...], place: dict[str, str], stack: str, pipe: Connection) -> None:
    os.environ.update(place)
    with open(stack, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            message = ("", function(*args))
        except BaseException as error:
            message = (f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send(message)
        pipe.close()
        sys.stdout.flush()
        # Leave without destructors: a rank that waits for a failed peer in one would never end.
        os._exit(0)
