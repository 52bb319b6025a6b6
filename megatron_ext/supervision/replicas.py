"""Compares tensors that must be equal on several ranks, bit for bit, and names those that differ and their ranks.

A replica that has drifted or was corrupted trains on silently: gradients are averaged, losses look right. Here each rank reduces every
tensor to one 64-bit number on its device, and one small collective per group compares the numbers. Names, ranks and values are exchanged
only where they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.collectives import all_gather_objects, all_reduce_max
from megatron_ext.sharding import ShardSpec
from megatron_ext.topology import Group, Groups

_CHUNK = 1 << 20  # elements digested at once: 8 MiB per temporary
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; 2**64 over the golden ratio, as int64 holds it
_NOTHING = -(1 << 63)
_MOST_NAMED = 5


@dataclass(frozen=True)
class Replica:
    """A tensor that must be equal on all ranks of a group. Each of them lists the same names for the group, in the same order."""

    name: str
    group: Group
    tensor: Tensor | None
    """This rank's copy; None if it holds none, such as a pipeline stage between those that share an embedding."""


def parameter_replicas(parameters: Iterable[tuple[ShardSpec, Tensor]], groups: Groups, shared: Iterable[str] = ()) -> list[Replica]:
    """The replicas among a model's parameters.

    Every parameter is compared over the data-parallel group, parameters that are not split also over the tensor-parallel group, and
    `shared` ones over the pipeline.

    Args:
        parameters: the parameters that this rank holds, with their specs.
        groups: this rank's process groups.
        shared: names of the parameters that several pipeline stages hold, the same list on every rank.
    """
    held = list(parameters)
    by_name = {spec.name: tensor for spec, tensor in held}
    return [
        *(Replica(spec.name, groups.data, tensor) for spec, tensor in held),
        *(Replica(spec.name, groups.tensor, tensor) for spec, tensor in held if spec.split_dim is None),
        *(Replica(name, groups.pipeline, by_name.get(name)) for name in shared),
    ]


def digest(tensor: Tensor) -> Tensor:
    """A checksum (int64 scalar on the tensor's device) of the bits and the positions of all elements.

    It is the sum of the elements' bits, taken as integers, times a pseudo-random odd weight per position, modulo 2**64. One changed
    element always changes it; swapped elements, signs, -0.0 and the bits of a NaN count too. The order of summation does not matter.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    places = torch.arange(min(_CHUNK, len(bits)), device=bits.device, dtype=torch.int64) * _MULTIPLIER
    weights = (places ^ (places >> 29)) * _MULTIPLIER ^ (places >> 32) | 1
    total = torch.full((), len(bits), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * _MULTIPLIER + (chunk.to(torch.int64) * weights[: len(chunk)]).sum()
    return total


def find_differences(replicas: Sequence[Replica], world: Group, device: torch.device) -> list[str]:
    """Find the replicas that are not equal on all their ranks: one line for each with name, ranks and largest difference.

    Every rank of the world must call this, and every rank gets the same lines. The only collectives needed are maxima of int64 and float32.

    Args:
        replicas: this rank's replicas; groups in the same order on all ranks of a group.
        world: all ranks, over a backend for host memory.
        device: where the other groups' collectives run.
    """
    replicas = [replica for replica in replicas if replica.group.size > 1]
    tensors = {id(replica.tensor): replica.tensor for replica in replicas if replica.tensor is not None}
    digests = {key: digest(tensor).to(device) for key, tensor in tensors.items()}
    unequal = [
        _unequal([digests.get(id(replica.tensor)) for replica in replicas if replica.group is group], group, world, device)
        for group in {id(replica.group): replica.group for replica in replicas}.values()
    ]
    found = torch.stack(unequal).any() if unequal else torch.zeros(())
    if not all_reduce_max(torch.tensor(int(found)), world):
        return []
    return _explain(replicas, {key: int(value) for key, value in digests.items()}, world, device)


def _unequal(digests: Sequence[Tensor | None], group: Group, world: Group, device: torch.device) -> Tensor:
    """Whether any of the digests differs in the group (bool scalar on `device`)."""
    nothing = torch.full((), _NOTHING, dtype=torch.int64, device=device)
    lowest = torch.stack([nothing if value is None else ~value for value in digests])  # the maximum of ~x is ~ of the minimum of x
    highest = torch.stack([nothing if value is None else value for value in digests])
    both = torch.stack([highest, lowest])
    both = all_reduce_max(both.cpu(), group).to(device) if group is world else all_reduce_max(both, group)
    return (both[0] != ~both[1]).any()


def _explain(replicas: Sequence[Replica], digests: dict[int, int], world: Group, device: torch.device) -> list[str]:
    """The slow path: exchange names and digests, and describe what differs."""
    mine = [(r.name, r.group.ranks, None if r.tensor is None else (digests[id(r.tensor)], tuple(r.tensor.shape))) for r in replicas]
    holders: dict[tuple[str, tuple[int, ...]], dict[int, tuple[int, tuple[int, ...]]]] = {}
    for rank, entries in enumerate(all_gather_objects(mine, world)):
        for name, ranks, held in entries:
            if held is not None:
                holders.setdefault((name, ranks), {})[rank] = held
    different = [key for key, by_rank in holders.items() if len({value for value, _ in by_rank.values()}) > 1]
    spreads: dict[tuple[str, tuple[int, ...]], float] = {}
    for replica in replicas:
        key = (replica.name, replica.group.ranks)
        if key in different[:_MOST_NAMED] and (replica.tensor is None or replica.tensor.is_floating_point()):
            shape = next(iter(holders[key].values()))[1]
            spreads[key] = _spread(replica, shape, world, device)
    known = {key: spread for of_rank in all_gather_objects(spreads, world) for key, spread in of_rank.items()}

    # A parameter may be compared over two groups, the data-parallel and the tensor-parallel: all ranks that must agree on it are one set.
    sets: list[tuple[str, dict[int, int], float | None]] = []
    names = {name for name, _ in different}
    for (name, ranks), by_rank in holders.items():
        values, spread = {rank: value for rank, (value, _) in by_rank.items()}, known.get((name, ranks))
        for other in [entry for entry in sets if entry[0] == name and entry[1].keys() & values.keys()]:
            sets.remove(other)
            values |= other[1]
            spread = max(filter(None, (spread, other[2])), default=None)
        if name in names:
            sets.append((name, values, spread))
    sets = [entry for entry in sets if len(set(entry[1].values())) > 1]
    lines = [_line(*entry) for entry in sets]
    return lines[:_MOST_NAMED] + ([f"and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else [])


def _spread(replica: Replica, shape: tuple[int, ...], world: Group, device: torch.device) -> float:
    """Largest difference of one element between two ranks of the group; infinite where a rank holds a number that is not finite."""
    device = torch.device("cpu") if replica.group is world else device
    if replica.tensor is None:
        both = torch.full((2, *shape), -torch.inf, device=device)
    else:
        values = replica.tensor.detach().to(device, torch.float32)
        both = torch.stack([values, -values]).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    both = all_reduce_max(both, replica.group)
    return float((both[0] + both[1]).max())


def _line(name: str, values: dict[int, int], spread: float | None) -> str:
    """`name: rank 1 differs from ranks 0, 2, 3 (largest difference 1.0e-03)`: the minority differs from the majority."""
    # If two values are held by equally many ranks, that of the lowest rank is assumed to be right.
    right = Counter(values[rank] for rank in sorted(values)).most_common(1)[0][0]
    wrong_ranks = sorted(rank for rank in values if values[rank] != right)
    right_ranks = sorted(rank for rank in values if values[rank] == right)

    def text(ranks: list[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

    size = f" (largest difference {spread:.1e})" if spread is not None else ""
    return f"{name}: {text(wrong_ranks)} differ{'s' if len(wrong_ranks) == 1 else ''} from {text(right_ranks)}{size}"
