"""Runs one function on N processes that form a torch.distributed world: the only way tests start ranks.

The world is megatron_ext.supervision.local_ranks; here are its environment, its preloaded modules and its timeout for tests.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

from megatron_ext.supervision.local_ranks import RankError, free_port, run_ranks

__all__ = ["ENVIRONMENT", "PRELOAD", "RankError", "free_port", "run_distributed"]

# One thread a rank: more ranks than cores with two threads each run ten times slower.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
ENVIRONMENT["LOCAL_SIZE"] = "1"  # DeepSpeed would count the devices of a CPU by starting numactl, again and again under ZeRO-3
ENVIRONMENT["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as pangu.train sets it, too late for the fork server
PRELOAD = ["helpers.preload"]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0) -> list[Any]:
    """See `run_ranks`. Tensors in the results are copies."""
    return [pickle.loads(result) for result in run_ranks(_measured, world_size, function, *args, timeout=timeout, preload=PRELOAD)]


def _measured(function: Callable[..., Any], *args: Any) -> bytes:
    """Call the function and keep what it covered under `make coverage`: a rank whose result has arrived is killed before it could."""
    try:
        return pickle.dumps(function(*args))
    finally:
        if (coverage := sys.modules.get("coverage")) and (measured := coverage.Coverage.current()):
            measured.save()
