"""Reports what a checkpoint of any format is, and everything that is wrong with it.

    found = look(Path("weights/2.6B"))          # names and shapes: what it is, and which tensors are missing, unknown or of a wrong shape
    verify(found, advance)                      # every number of every tensor, and the checksums that the format keeps
    found.problems                              # a line each; empty: sound

A problem is what a reader or `weights.complete` would refuse; here they collect it and continue (`Overrides.problems`). One tensor is in
memory at a time, or two where the source holds a tensor twice.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pangu.config.presets import MODEL_PRESETS
from pangu.conversion.formats import FORMATS, detect_format, open_weights
from pangu.conversion.weights import Advance, Overrides, Weights
from pangu.errors import InputError
from pangu.tensor_files.lazy_tensor import LazyTensor

BLOCK_NUMBERS = 1 << 16
"""Number of elements converted to float64 at once: few enough to stay in the processor's cache."""

_GAIN = re.compile(r"\.ln_(?:1|2|f)\.weight$")
# Kinds of what is no weight, by their names in any format; the first that fits.
_LEFT_OUT = {
    "optimizer": re.compile(r"adam_[mv]|moment|accu_grads|optim|lr_scheduler"),
    "random state": re.compile(r"rng"),
    "masks": re.compile(r"attn\.(?:masked_)?bias$"),
    "output layer": re.compile(r"lm_head"),
    "bookkeeping": re.compile(""),
}


@dataclass(frozen=True)
class Values:
    """Statistics of a tensor's values. NaN and infinity are counted and otherwise left out; a statistic is None if nothing is left."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    num_nan: int = 0
    num_inf: int = 0
    first_bad: tuple[int, ...] | None = None
    """Index of the first NaN or infinity."""


@dataclass
class Inspection:
    """The result of an inspection."""

    path: Path
    format: str
    weights: Weights | None
    """The weights; None for a training checkpoint that cannot be read, whose files can still be verified."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks that are not problems."""
    values: dict[str, Values] | None = None
    """Statistics of every tensor that could be read; None if `verify` has not run."""

    def as_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """The result as plain values, for scripts; `tensors`: include a list of the tensors."""
        found: dict[str, Any] = {"path": str(self.path), "format": self.format, "verified": self.values is not None}
        if self.weights is not None:
            found |= _describe(self.weights)
            if tensors:
                found["tensors"] = [_describe_tensor(name, tensor, self.values or {}) for name, tensor in self.weights.tensors.items()]
        return found | {"sound": not self.problems, "problems": self.problems, "notes": self.notes}


def _describe(weights: Weights) -> dict[str, Any]:
    config = weights.config
    tensors = weights.tensors.values()
    same = (
        name for name, preset in MODEL_PRESETS.items() if all(getattr(config, key) == preset[key] for key in ("num_layers", "hidden_size"))
    )
    return {
        "source": weights.source,
        "preset": next(same, None),
        "model": config.identity() | {"num_heads": config.num_heads or None},
        "num_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "num_tensors": len(tensors),
        "dtypes": dict(Counter(dtype_name(tensor.dtype) for tensor in tensors)),
        "layout": dict(weights.layout),
        "num_files": len(weights.files),
        "num_bytes": sum(file.stat().st_size for file in weights.files if file.is_file()),
        "step": weights.step,
        "left_out": dict(Counter(next(kind for kind, names in _LEFT_OUT.items() if names.search(name)) for name in weights.left_out)),
        "tokenizer": str(weights.tokenizer) if weights.tokenizer else None,
    }


def _describe_tensor(name: str, tensor: LazyTensor, values: dict[str, Values]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    if name in values:
        found |= {key: getattr(values[name], key) for key in ("minimum", "maximum", "mean", "std", "num_nan", "num_inf")}
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def look(path: Path, *, format_name: str = "auto", num_heads: int | None = None) -> Inspection:
    """Inspect names and shapes of what a path holds.

    Args:
        path: file or directory.
        format_name: a key of `FORMATS`, or `auto`.
        num_heads: number of attention heads, if the source does not contain it.

    Raises:
        InputError: if the format is unknown, or the damage is such that the tensors cannot be listed.
    """
    name = detect_format(path) if format_name == "auto" else format_name
    where = FORMATS[name].locate(path)
    found = Inspection(where, name, None)
    try:
        found.weights = open_weights(path, Overrides(num_heads, problems=found.problems), format_name=name)
    except InputError as error:
        checksums = FORMATS[name].checksums
        if checksums is None or not checksums.without_weights:
            raise
        found.problems.append(str(error))
    found.problems[:] = [problem.removeprefix(f"{where}: ") for problem in found.problems]
    if found.weights is not None and not found.weights.config.num_heads:
        found.notes.append("weights do not say how many attention heads there are; whoever reads these must (--heads)")
    return found


def bytes_to_verify(found: Inspection) -> int:
    """Number of bytes that `verify` will read."""
    checksums = FORMATS[found.format].checksums
    checked = checksums.files(found.path, found.weights) if checksums else []
    total = sum(file.stat().st_size for file in checked if file.is_file())
    for tensor in found.weights.tensors.values() if found.weights else ():
        total += sum(math.prod(one.shape) * one.dtype.itemsize for one in (tensor, *(copy for _, copy in tensor.copies())))
    return total


def verify(found: Inspection, advance: Advance = lambda read: None) -> None:
    """Read all of a checkpoint, and add to the problems and notes of `found`.

    Checked are: NaN and infinity; tensors all of whose numbers are the same, unless a model that was not trained has them; copies of a
    tensor that differ (a stored output layer, replicas of tensor-parallel or MindSpore ranks); MindSpore's CRC-32; the hashes of a training
    checkpoint's files, optimizer states and random states included, and files that it lacks or has too many.
    """
    found.values = {}
    if checksums := FORMATS[found.format].checksums:
        problems, notes = checksums.verify(found.path, checksums.files(found.path, found.weights), advance)
        found.problems += problems
        found.notes += notes
    fresh: Counter[str] = Counter()
    for name, tensor in found.weights.tensors.items() if found.weights else ():
        try:
            value = tensor.read()
        except InputError as error:
            found.problems.append(f"{name} cannot be read: {error}")
            continue
        advance(value.nbytes)
        values = found.values[name] = measure(value)
        if values.first_bad is not None:
            bad = f"{values.num_nan:,} NaN and {values.num_inf:,} infinite numbers of {value.numel():,}"
            found.problems.append(f"{name} has {bad}, the first at {list(values.first_bad)}")
        elif value.numel() > 1 and values.minimum == values.maximum:
            untrained = _untrained(name, values.minimum)
            if untrained:
                fresh[untrained] += 1
            else:
                found.problems.append(f"{name} is constant: each of its {value.numel():,} numbers is {values.minimum:g}")
        found.problems += _differing_copies(name, value, tensor, advance)
        del value
    if fresh:
        counts = ", ".join(f"{what}: {count}" for what, count in fresh.items())
        found.notes.append(f"{counts}; so they are in a model that was not trained")


def measure(tensor: Tensor) -> Values:
    """Statistics of a tensor with any memory layout, computed in blocks of float64."""
    minimum, maximum, count, mean, squares = math.inf, -math.inf, 0, 0.0, 0.0
    num_nan = num_inf = 0
    first_bad = None
    for begin, block in _blocks(tensor):
        numbers = block.double()
        low, high = (float(bound) for bound in numbers.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = numbers.isfinite()
            nan = int(numbers.isnan().sum())
            num_nan, num_inf = num_nan + nan, num_inf + int((~finite).sum()) - nan
            if first_bad is None:
                row, *rest = (~finite).nonzero()[0].tolist()
                first_bad = (begin + row, *rest)[: tensor.dim()]
            numbers = numbers[finite]
            if not numbers.numel():
                continue
            low, high = (float(bound) for bound in numbers.aminmax())
        minimum, maximum = min(minimum, low), max(maximum, high)
        # Mean and squared deviations of two sets together (Chan, Golub, LeVeque 1979): no difference of large sums.
        # torch.var_mean would take twenty times as long.
        size, centre = numbers.numel(), float(numbers.mean())
        shift, total = centre - mean, count + size
        mean += shift * size / total
        squares += float((numbers - centre).square_().sum()) + shift * shift * count * size / total
        count = total
    if not count:
        return Values(None, None, None, None, num_nan, num_inf, first_bad)
    return Values(minimum, maximum, mean, math.sqrt(squares / count), num_nan, num_inf, first_bad)


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of the first row, and the rows, of each block. A transposed tensor is not copied as a whole."""
    if tensor.dim() == 0:
        tensor = tensor.view(1)
    rows = max(1, BLOCK_NUMBERS // max(1, math.prod(tensor.shape[1:])))
    for begin in range(0, tensor.shape[0] if tensor.numel() else 0, rows):
        yield begin, tensor[begin : begin + rows]


def _untrained(name: str, value: float | None) -> str | None:
    """Description of a constant tensor that an untrained model also has; None if an untrained model does not have it."""
    if _GAIN.search(name):
        return "LayerNorm gains of all ones" if value == 1 else None
    return "biases of all zeros" if name.endswith(".bias") and value == 0 else None


def _differing_copies(name: str, value: Tensor, tensor: LazyTensor, advance: Advance) -> Iterator[str]:
    """One line about all places that hold a different tensor than the one that was read."""
    different, how = [], ""
    for place, copy in tensor.copies():
        try:
            other = copy.read()
        except InputError as error:
            yield f"{name} in {place} cannot be read: {error}"
            continue
        advance(other.nbytes)
        difference = _difference(value, other)
        if difference:
            different.append(place)
            how = how or difference
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        yield f"{name} differs in {', '.join(different[:3])}{more} from what is read ({how})"


def _difference(value: Tensor, other: Tensor) -> str:
    """How two tensors differ, with NaN equal to NaN; empty if they are equal."""
    if value.shape != other.shape:
        return f"shape {list(other.shape)}, not {list(value.shape)}"
    count, first = 0, None
    for (begin, one), (_, two) in zip(_blocks(value), _blocks(other), strict=True):
        unequal = (one != two) & ~((one != one) & (two != two))
        if found := int(unequal.sum()):
            if first is None:
                row, *rest = unequal.nonzero()[0].tolist()
                first = [begin + row, *rest]
            count += found
    return f"{count:,} of {value.numel():,} numbers, the first at {first}" if count else ""
