"""The device and the collective backend of this process.

A thin layer over `deepspeed.accelerator`: DeepSpeed already detects CUDA (nccl), Ascend NPU (hccl, through torch_npu) or CPU (gloo), and
its engine uses the same object, so there is one answer per process. This is the only file that names a device type or a backend.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.profiler import ProfilerActivity

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
    logging.disable(logging.WARNING)  # importing it warns that there is no GPU, once per rank; our log names the device anyway
    try:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()
    finally:
        logging.disable(logging.NOTSET)


def name() -> str:
    """The device type: `cuda`, `npu` or `cpu`."""
    return str(_accelerator()._name)


def backend() -> str:
    """The collective backend: `nccl`, `hccl` or `gloo`."""
    return str(_accelerator().communication_backend_name())


def device() -> torch.device:
    """This process's device."""
    return torch.device("cpu") if name() == "cpu" else torch.device(_accelerator().current_device_name())


def device_name() -> str:
    """A readable name of the device, for logs."""
    return (
        "CPU"
        if name() == "cpu"
        else str(_accelerator().get_device_name() if hasattr(_accelerator(), "get_device_name") else _device_model())
    )


def _device_model() -> str:
    namespace = getattr(torch, name())
    return str(namespace.get_device_name(namespace.current_device()))


def peak_flops() -> float | None:
    """Peak dense half-precision FLOP/s of the device, or None if it is not known."""
    if name() == "cpu":
        return None
    model = _device_model()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part.lower() in model.lower()), None)


def supports(precision: str) -> bool:
    """Whether DeepSpeed considers the device able to train in `precision`: `fp32`, `bf16` or `fp16`."""
    if precision == "bf16":
        return bool(_accelerator().is_bf16_supported())
    if precision == "fp16":
        return bool(_accelerator().is_fp16_supported())
    return True


def select_device() -> None:
    """Choose this process's device (LOCAL_RANK) and set DeepSpeed up for it, before torch.distributed is started."""
    accelerator = _accelerator()
    if name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce that only its inference engine calls, which takes a minute and needs a
        # compiler.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # torch_npu demands this before the process group
    if backend() == "hccl":
        # HCCL cannot reduce float64, but DeepSpeed sums ZeRO-3 gradient norms in it unless the accelerator reports that it has none.
        type(accelerator).is_fp64_supported = lambda self: False
    # DeepSpeed still calls these by the names they had before torch 2.13, thousands of times per run; and it broadcasts the tied weight of
    # a pipeline as a parameter instead of its data, which autograd reports as a mistake.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "c10d::broadcast_: an autograd kernel was not registered", UserWarning)


def start_collectives(connect: Callable[[], dist.Store], rank: int, world_size: int, timeout_seconds: float) -> None:
    """Start torch.distributed on the device's backend.

    Args:
        connect: opens a connection to the key-value store that all ranks share.
        rank: global rank of this process.
        world_size: number of processes.
        timeout_seconds: a collective fails if some rank has not joined it after this time.
    """
    import deepspeed

    # DeepSpeed knows how to start torch.distributed on this device, but does not accept a store; so the store is registered under a URL.
    scheme = f"store-{uuid.uuid4().hex}"
    register_rendezvous_handler(scheme, lambda url, **_: iter([(connect(), rank, world_size)]))
    deepspeed.init_distributed(
        dist_backend=backend(), timeout=timedelta(seconds=timeout_seconds), init_method=f"{scheme}://", verbose=False
    )


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached, which is usually a consequence of an earlier failure."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(
            sign in text for sign in ("/transport/tcp/", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "HCCL")
        )
    )


def get_rng_state() -> Tensor:
    """State of the device's default generator (uint8 tensor)."""
    return _accelerator().get_rng_state() if name() != "cpu" else torch.get_rng_state()


def set_rng_state(state: Tensor) -> None:
    """Set the state of the device's default generator."""
    if name() == "cpu":
        torch.set_rng_state(state)
    else:
        _accelerator().set_rng_state(state)


def pin(x: Tensor) -> Tensor:
    """A copy of `x` in page-locked host memory, for asynchronous transfer to the device; `x` itself on the CPU."""
    return x if name() == "cpu" else _accelerator().pin_memory(x)


def keep_freed_memory() -> None:
    """On the CPU, make glibc's allocator keep memory that this process frees instead of returning it to the kernel.

    Each step allocates the same large blocks as the last one. By default each is mapped anew, and the kernel clears all its pages first.
    """
    if name() == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in _MALLOC_OPTIONS:
            libc.mallopt(parameter, value)


def synchronize() -> None:
    """Wait until the device has finished all queued work."""
    if name() != "cpu":
        _accelerator().synchronize()


def max_memory_allocated() -> int:
    """Peak bytes of device memory allocated to tensors of this process; 0 on CPU, where it is not counted."""
    return 0 if name() == "cpu" else int(_accelerator().max_memory_allocated())


def profiler_activities() -> list[ProfilerActivity]:
    """What torch's profiler can record on this device: operators on the host, and on a CUDA device its kernels.

    An NPU's kernels are visible only to torch_npu's own profiler, which has another interface; there only the host is recorded.
    """
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if name() == "cuda" else [])]
