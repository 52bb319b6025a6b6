"""What torch really holds: the storages that operations made and that are still alive. Runs inside a rank."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While entered, notes every storage that an operation returns; a storage that autograd has saved is alive like any other."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                known = self._seen.get(storage._cdata)
                if known is None or known[0].expired():
                    self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), (str(function), leaf.dtype, tuple(leaf.shape)))
        return result

    def alive(self, but: Iterable[Tensor] = ()) -> list[tuple[int, tuple[Any, ...]]]:
        """Bytes of each storage that is alive and is none of `but`'s, and which operation made it."""
        gc.collect()
        excluded = {tensor.untyped_storage()._cdata for tensor in but}
        return [(size, made) for key, (reference, size, made) in self._seen.items() if not reference.expired() and key not in excluded]


def state_tensors(module: torch.nn.Module) -> list[Tensor]:
    """A module's parameters and what gradients they have now."""
    parameters = list(module.parameters())
    return [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]


def state_storages() -> dict[int, int]:
    """Bytes by address of every floating-point tensor that Python can reach and that may belong to parameters: of one or two dimensions.

    What a pipeline still holds of a micro-batch, hidden states and logits, has three.
    """
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and not tensor.is_meta and tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() < 3:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    found.pop(0, None)
    return found
