"""Runs one function on N processes that form a torch.distributed world: the only way tests start ranks.

A fork server that has torch and DeepSpeed imported starts each rank in milliseconds. A case that outlasts its timeout, or one rank of which
fails, is killed as a group; the error shows every rank's stack or traceback.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# One thread a rank: more ranks than cores with two threads each run ten times slower.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
ENVIRONMENT["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as pangu.train sets it, too late for the fork server
PRELOAD = ["helpers.preload"]


class RankError(AssertionError):
    """A rank failed, or the case did not end in time."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh world and return what each returned, in rank order.

    Args:
        function: defined at the top of a module. It finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment.
        world_size: number of processes.
        args: must pickle.
        timeout: seconds until the group is killed.

    Raises:
        RankError: with the first failing rank's traceback, or every rank's stack after a timeout.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / f"rank{rank}.txt" for rank in range(world_size)]
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, args, rank, world_size, port, str(stacks[rank]), sender), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, processes, stacks, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], stacks: list[Path], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=max(0.0, deadline - time.monotonic()))
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
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, stack: str, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(stack, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            message = (True, function(*args))
        except BaseException:
            message = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(message))
        pipe.close()
        sys.stdout.flush()
        # Leave without destructors: a rank that waits for a failed peer in one would never end.
        os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
