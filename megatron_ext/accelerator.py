"""Which device this process works on and which collective backend it talks through.

A thin layer over `deepspeed.accelerator`: DeepSpeed already finds CUDA (nccl), Ascend NPU (hccl, through torch_npu) or CPU (gloo), and its
engine uses the same object, so there is one answer in a process. This is the only file that names a device type or a backend.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.profiler import ProfilerActivity

from megatron_ext.topology import LayoutError, ranks_in_words

CONTROL_BACKEND = "gloo"
"""The backend of votes and small Python objects on every device: it needs only host memory."""

# Dense half-precision peak of one device in FLOP/s, by a part of its name; the first that fits counts. From the vendors' data sheets
# (NVIDIA V100, A100, H100, H200) and Huawei's announcement of the Ascend 910 (256 TFLOPS FP16). A device that is not listed has an
# unknown peak: no utilisation is reported.
_PEAK_FLOPS = {
    "V100": 125e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "Ascend910A": 256e12,
    "Ascend910ProA": 256e12,
}


# M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>: no mappings, nothing given back, the heap grows by 256 MiB.
_MALLOC_OPTIONS = ((-4, 0), (-1, -1), (-2, 2**28))


def _accelerator() -> Any:  # DeepSpeed's accelerator classes carry no useful types
    logging.disable(logging.WARNING)  # importing it warns that there is no GPU, once a rank; our log names the device anyway
    try:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()
    finally:
        logging.disable(logging.NOTSET)


def name() -> str:
    """The device type: `cuda`, `npu` or `cpu`."""
    return _accelerator()._name


def backend() -> str:
    """The collective backend: `nccl`, `hccl` or `gloo`."""
    return _accelerator().communication_backend_name()


def device() -> torch.device:
    """This process's device."""
    return torch.device("cpu") if name() == "cpu" else torch.device(_accelerator().current_device_name())


def device_name() -> str:
    """A name a person would recognise, for logs."""
    return (
        "CPU"
        if name() == "cpu"
        else str(_accelerator().get_device_name() if hasattr(_accelerator(), "get_device_name") else _device_model())
    )


def _device_model() -> str:
    namespace = getattr(torch, name())
    return str(namespace.get_device_name(namespace.current_device()))


def peak_flops() -> float | None:
    """Peak dense half-precision FLOP/s of the device, or None where it is not known."""
    if name() == "cpu":
        return None
    model = _device_model()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part.lower() in model.lower()), None)


def supports(precision: str) -> bool:
    """Whether the device trains in `fp32`, `bf16` or `fp16`, as DeepSpeed will judge it."""
    if precision == "bf16":
        return bool(_accelerator().is_bf16_supported())
    if precision == "fp16":
        return bool(_accelerator().is_fp16_supported())
    return True


class Meeting(NamedTuple):
    """The ranks of one start, who have found each other."""

    rank: int
    connect: Callable[[], dist.Store]
    """Opens a connection of one's own to the key-value store of this start. A call that waits there blocks no other thread's."""
    members: tuple[tuple[str, int], ...]
    """Host and process id of each rank."""
    server: str
    """Who serves the store, in words."""


def initialize(timeout_seconds: float, join_seconds: float | None = None) -> Meeting:
    """Choose the device of this process, meet the other ranks and start torch.distributed on the device's backend.

    Reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); a process started without a launcher becomes
    a world of one.

    Args:
        timeout_seconds: after so long a collective that some rank has not joined fails.
        join_seconds: how long to wait for the other ranks to start; None = `timeout_seconds`.

    Raises:
        LayoutError: if the ranks do not come together. It names those that are missing or do not fit.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = _accelerator()
    import deepspeed

    if name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce that only its inference engine calls: a minute, and a compiler, for nothing.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # torch_npu demands this before the process group
    if backend() == "hccl":
        # HCCL reduces no float64, but DeepSpeed sums ZeRO-3 gradient norms in it wherever the accelerator does not deny having it.
        type(accelerator).is_fp64_supported = lambda self: False
    # DeepSpeed still calls these by their names of before torch 2.13, thousands of times a run; and it broadcasts the tied weight of a
    # pipeline as a parameter and not as its data, which autograd takes for a mistake.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "c10d::broadcast_: an autograd kernel was not registered", UserWarning)
    meeting = _meet(join_seconds or timeout_seconds)
    # DeepSpeed knows best how this torch wants to be started on this device, but lets nobody hand it a store; so the store has an address.
    scheme = f"met-{uuid.uuid4().hex}"
    register_rendezvous_handler(scheme, lambda url, **_: iter([(meeting.connect(), meeting.rank, len(meeting.members))]))
    deepspeed.init_distributed(
        dist_backend=backend(), timeout=timedelta(seconds=timeout_seconds), init_method=f"{scheme}://", verbose=False
    )
    return meeting


def _meet(seconds: float) -> Meeting:
    """Find the other ranks of this start at MASTER_ADDR:MASTER_PORT.

    torchrun keeps one store for all its restarts, and there a new rank would read a dead one's address and call it in vain. No number in
    the environment tells the starts apart on several nodes (TORCHELASTIC_RESTART_COUNT counts each node's own failures). So rank 0 numbers
    them, and lets the others begin with a list of those who came to this one; a rank that is not in the list looks for a newer start.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not 0 <= rank < world_size:
        raise LayoutError(f"RANK={rank} does not lie below WORLD_SIZE={world_size}. Start the ranks with 0 to {world_size - 1}.")
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
                raise LayoutError(
                    f"rank {rank} was not let in at {address}:{port} within {seconds:.0f} s: no rank 0 has started, or another process "
                    f"is rank {rank} too. {_CHECK_START}"
                )
            time.sleep(0.1 + world_size / 2000)  # one process answers all ranks
            start = store.add("starts", 0)
    except dist.DistNetworkError:
        raise LayoutError(f"rank {rank}: rank 0 left before all ranks had met; its own error says why.") from None

    def connect() -> dist.Store:
        own = dist.TCPStore(store.host, store.port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        return dist.PrefixStore(f"start-{start}", own)

    people = tuple((host, process) for host, process, *_ in members)
    return Meeting(rank, connect, people, "the launcher" if launcher_serves else "rank 0")


_CHECK_START = "Start all ranks with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, or let a launcher do it."


def _open_store(address: str, port: int, seconds: float, rank: int, *, serve: bool) -> dist.TCPStore:
    """A connection to the store of MASTER_ADDR:MASTER_PORT, which `serve` starts."""
    timeout = timedelta(seconds=seconds)
    if serve:
        try:
            return dist.TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        except dist.DistNetworkError as error:
            raise LayoutError(
                f"MASTER_PORT={port} on {socket.gethostname()} cannot be opened, another program has it or it is not allowed: "
                f"{str(error).splitlines()[0]} Choose another: --master_port (deepspeed), --master-port (torchrun)."
            ) from None
    deadline = time.monotonic() + seconds
    while True:  # torch would try too, but tell each failure in a page of C++ frames
        try:
            socket.create_connection((address, port), timeout=5).close()
            return dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except OSError as error:
            if time.monotonic() > deadline:
                raise LayoutError(
                    f"rank {rank}: nobody answers at MASTER_ADDR={address} MASTER_PORT={port} within {seconds:.0f} s ({error}): rank 0, "
                    f"which serves there, has not started, or the address is wrong. {_CHECK_START}"
                ) from None
            time.sleep(0.2)


def _await_members(store: dist.Store, start: int, world_size: int, deadline: float, seconds: float) -> list[list[Any]]:
    """What every rank says of itself, in rank order: host, process id, WORLD_SIZE and a mark of its own."""
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"start-{start}/{rank}"])]:
        if time.monotonic() > deadline:
            raise LayoutError(f"{ranks_in_words(missing)} of WORLD_SIZE={world_size} did not join within {seconds:.0f} s. {_CHECK_START}")
        time.sleep(0.1)
    members = [json.loads(store.get(f"start-{start}/{rank}")) for rank in range(world_size)]
    for rank, (host, process, believed, _) in enumerate(members):
        if believed != world_size:
            raise LayoutError(
                f"rank {rank} ({host}, process {process}) was started with WORLD_SIZE={believed}, rank 0 with {world_size}. {_CHECK_START}"
            )
    return members


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says that another rank could not be talked to, which is rarely the first thing that went wrong."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(
            sign in text for sign in ("/transport/tcp/", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "HCCL")
        )
    )


def get_rng_state() -> Tensor:
    """State of the device's default generator (uint8)."""
    return _accelerator().get_rng_state() if name() != "cpu" else torch.get_rng_state()


def set_rng_state(state: Tensor) -> None:
    """Set the state of the device's default generator."""
    if name() == "cpu":
        torch.set_rng_state(state)
    else:
        _accelerator().set_rng_state(state)


def pin(x: Tensor) -> Tensor:
    """A copy in page-locked host memory, from where it reaches the device while the host goes on; `x` itself on the CPU."""
    return x if name() == "cpu" else _accelerator().pin_memory(x)


def keep_freed_memory() -> None:
    """On the CPU, let the allocator of glibc keep what this process frees.

    A step asks for the same large pieces as the last one. By default each is mapped anew, and the kernel clears every page of it first.
    """
    if name() == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in _MALLOC_OPTIONS:
            libc.mallopt(parameter, value)


def synchronize() -> None:
    """Wait until the device has done all it was given."""
    if name() != "cpu":
        _accelerator().synchronize()


def max_memory_allocated() -> int:
    """Peak bytes of device memory that tensors of this process took; 0 on CPU, where nobody counts."""
    return 0 if name() == "cpu" else int(_accelerator().max_memory_allocated())


def profiler_activities() -> list[ProfilerActivity]:
    """What torch's profiler can record here: operators on the host, and on a CUDA device its kernels.

    An NPU's kernels are seen by torch_npu's own profiler alone, which has another interface; there this records the host.
    """
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if name() == "cuda" else [])]
