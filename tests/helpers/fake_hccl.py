"""A torch.distributed backend named `hccl` that works over gloo and refuses what Huawei's HCCL refuses.

It proves which collectives, dtypes and shapes the program asks for, not HCCL's numerics or its asynchronous order.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

REDUCIBLE = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16}
"""What HcclAllReduce takes (bfloat16 from the 910B on); float64 may be sent, but not summed."""
OPERATIONS = {dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN}


class FakeHccl(dist.ProcessGroup):
    """Checks each call and hands it to an inner gloo group."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    group_name = pg_name

    def _check(self, tensors: Any, options: Any, what: str) -> None:
        for tensor in tensors:
            if tensor.dtype not in REDUCIBLE:
                raise RuntimeError(f"HCCL does not support {tensor.dtype} in {what}")
        if options is not None and not any(options.reduceOp == operation for operation in OPERATIONS):
            raise RuntimeError(f"HCCL does not support {options.reduceOp} in {what}")

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        self._check(tensors, options, "allreduce")
        return self._gloo.allreduce(tensors, options)

    def allreduce_coalesced(self, tensors: Any, options: Any = None) -> Any:
        self._check(tensors, options, "allreduce")
        return self._gloo.allreduce_coalesced(tensors, options)

    def reduce(self, tensors: Any, options: Any = None) -> Any:
        self._check(tensors, options, "reduce")
        return self._gloo.reduce(tensors, options)

    def reduce_scatter(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        self._check(outputs, options, "reduce_scatter")
        return self._gloo.reduce_scatter(outputs, inputs, options)

    def _reduce_scatter_base(self, output: Any, source: Any, options: Any = None) -> Any:
        self._check([output], options, "reduce_scatter")
        return self._gloo._reduce_scatter_base(output, source, options)

    # torch 2.13 calls the new names, earlier ones the old; the inner group has the old.
    reduce_scatter_single = _reduce_scatter_base

    def _allgather_base(self, output: Any, source: Any, options: Any = None) -> Any:
        return self._gloo._allgather_base(output, source, *([options] if options is not None else []))

    all_gather_single = _allgather_base

    def gather(self, *args: Any) -> Any:
        raise RuntimeError("HCCL does not support gather")

    def scatter(self, *args: Any) -> Any:
        raise RuntimeError("HCCL does not support scatter")


def _delegate(name: str) -> Any:
    def call(self: FakeHccl, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._gloo, name)(*args, **kwargs)

    return call


for _name in ("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast"):
    setattr(FakeHccl, _name, _delegate(_name))
for _name in ("recv", "recv_anysource", "send"):
    setattr(FakeHccl, _name, _delegate(_name))


def install() -> None:
    """Register the backend in this process and make DeepSpeed's accelerator answer with its name, as torch_npu's does."""
    from deepspeed.accelerator import get_accelerator

    assert "hccl" not in dist.Backend.backend_list, "a real hccl backend is registered"
    dist.Backend.register_backend("hccl", FakeHccl, devices=["cpu"])
    get_accelerator()._communication_backend_name = "hccl"
