"""How the ranks of a run find each other: a key-value store at MASTER_ADDR:MASTER_PORT, and torch.distributed started from it."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_ext import accelerator
from megatron_ext.errors import RendezvousError, ranks_in_words


class Rendezvous(NamedTuple):
    """The result of a successful rendezvous: the ranks of one start, and the key-value store that they share."""

    rank: int
    connect: Callable[[], dist.Store]
    """Opens a new connection to the key-value store of this start. A call that waits on one connection does not block the others."""
    members: tuple[tuple[str, int], ...]
    """Host and process id of each rank."""
    server: str
    """The process that serves the store: `the launcher` or `rank 0`."""


def initialize(timeout_seconds: float, join_seconds: float | None = None) -> Rendezvous:
    """Choose the device of this process, wait for the other ranks and start torch.distributed on the device's backend.

    Reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); a process started without a launcher becomes
    a world of one.

    Args:
        timeout_seconds: a collective fails if some rank has not joined it after this time.
        join_seconds: how long to wait for the other ranks to start; None = `timeout_seconds`.

    Raises:
        RendezvousError: if the ranks do not find each other. It names those that are missing or were started with other settings.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator.select_device()
    found = find_ranks(join_seconds or timeout_seconds)
    accelerator.start_collectives(found.connect, found.rank, len(found.members), timeout_seconds)
    return found


def find_ranks(seconds: float) -> Rendezvous:
    """Find the other ranks of this start at MASTER_ADDR:MASTER_PORT.

    torchrun keeps one store for all its restarts, in which a new rank would read the address of a dead one and wait for an answer that
    never comes. No environment variable tells the starts apart on several nodes (TORCHELASTIC_RESTART_COUNT counts each node's own
    failures). Therefore rank 0 numbers the starts and publishes a list of the members of each; a rank that is not in the list looks for a
    newer start.

    Raises:
        RendezvousError: if the ranks do not find each other within `seconds`.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not 0 <= rank < world_size:
        raise RendezvousError(f"RANK={rank} is not below WORLD_SIZE={world_size}. Start the ranks with 0 to {world_size - 1}.")
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _open_store(address, port, seconds, rank, serve=rank == 0 and not launcher_serves)
    deadline = time.monotonic() + seconds
    me = [socket.gethostname(), os.getpid(), world_size, uuid.uuid4().hex]
    try:
        start = store.add("starts", 1 if rank == 0 else 0)
        while True:
            store.set(f"start-{start}/{rank}", json.dumps(me))
            if rank == 0:
                store.set(f"start-{start}/members", json.dumps(_await_members(store, start, world_size, deadline, seconds)))
            members = json.loads(store.get(f"start-{start}/members")) if store.check([f"start-{start}/members"]) else []
            if me in members:
                break
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {rank} was not admitted at {address}:{port} within {seconds:.0f} s: no rank 0 has started, or another process "
                    f"is rank {rank} too. {_CHECK_START}"
                )
            time.sleep(0.1 + world_size / 2000)  # one process answers all ranks
            start = store.add("starts", 0)
    except dist.DistNetworkError:
        raise RendezvousError(f"rank {rank}: rank 0 ended before all ranks had joined; its own error says why.") from None

    def connect() -> dist.Store:
        own = dist.TCPStore(store.host, store.port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        return dist.PrefixStore(f"start-{start}", own)

    people = tuple((host, process) for host, process, *_ in members)
    return Rendezvous(rank, connect, people, "the launcher" if launcher_serves else "rank 0")


_CHECK_START = "Start all ranks with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, or let a launcher do it."


def _open_store(address: str, port: int, seconds: float, rank: int, *, serve: bool) -> dist.TCPStore:
    """A connection to the store of MASTER_ADDR:MASTER_PORT, which `serve` starts."""
    timeout = timedelta(seconds=seconds)
    if serve:
        try:
            return dist.TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        except dist.DistNetworkError as error:
            raise RendezvousError(
                f"MASTER_PORT={port} on {socket.gethostname()} cannot be opened; another program uses it or it is not allowed: "
                f"{str(error).splitlines()[0]} Choose another: --master_port (deepspeed), --master-port (torchrun)."
            ) from None
    deadline = time.monotonic() + seconds
    while True:  # torch would retry too, but print a page of C++ frames for each failure
        try:
            socket.create_connection((address, port), timeout=5).close()
            return dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {rank}: nobody answers at MASTER_ADDR={address} MASTER_PORT={port} within {seconds:.0f} s ({error}): rank 0, "
                    f"which listens there, has not started, or the address is wrong. {_CHECK_START}"
                ) from None
            time.sleep(0.2)


def _await_members(store: dist.Store, start: int, world_size: int, deadline: float, seconds: float) -> list[list[Any]]:
    """What every rank publishes about itself, in rank order: host, process id, WORLD_SIZE and a unique id."""
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"start-{start}/{rank}"])]:
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"{ranks_in_words(missing)} of WORLD_SIZE={world_size} did not join within {seconds:.0f} s. {_CHECK_START}"
            )
        time.sleep(0.1)
    members = [json.loads(store.get(f"start-{start}/{rank}")) for rank in range(world_size)]
    for rank, (host, process, believed, _) in enumerate(members):
        if believed != world_size:
            raise RendezvousError(
                f"rank {rank} ({host}, process {process}) was started with WORLD_SIZE={believed}, rank 0 with {world_size}. {_CHECK_START}"
            )
    return members
