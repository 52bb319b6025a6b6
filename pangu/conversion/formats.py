"""The formats of weights by name, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pangu.conversion import deepspeed, huggingface, megatron, mindspore, mindspore_shards, npy
from pangu.conversion.weights import Checksums, Overrides, Weights, WriteOptions
from pangu.engine.checkpoint_reader import locate
from pangu.errors import InputError


@dataclass(frozen=True)
class Format:
    """One format: how it is recognised, read, written and verified. The programs know of a format what is said here."""

    detect: Callable[[Path], bool]
    read: Callable[[Path, Overrides], Weights]
    write: Callable[[Weights, Path, WriteOptions], None] | None = None
    """None: the format is only read."""
    keeps_optimizer: bool = False
    """Whether the writer has a place for the optimizer's states."""
    says_gelu: bool = True
    """Whether what is written says which activation the model has; otherwise whoever reads it must know."""
    checksums: Checksums | None = None
    locate: Callable[[Path], Path] = lambda path: path
    """What a path stands for: itself, or the newest of the checkpoints in it."""


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.detect, huggingface.read, huggingface.write),
    "megatron": Format(megatron.detect, megatron.read, megatron.write),
    "deepspeed": Format(deepspeed.detect, deepspeed.read, checksums=deepspeed.CHECKSUMS, locate=locate),
    "mindspore-shards": Format(mindspore_shards.detect, mindspore_shards.read, checksums=mindspore.CHECKSUMS),
    "mindspore": Format(
        mindspore.detect, mindspore.read, mindspore.write, keeps_optimizer=True, says_gelu=False, checksums=mindspore.CHECKSUMS
    ),
    "npy": Format(npy.detect, npy.read, npy.write, says_gelu=False),
}


def detect_format(path: Path) -> str:
    """The format a path holds, by looking at its files.

    Raises:
        InputError: if there is nothing, or nothing known.
    """
    try:
        if not path.exists():
            raise InputError(f"{path}: not found.")
        for name, candidate in FORMATS.items():
            if candidate.detect(path):
                return name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    raise InputError(
        f"{path}: holds weights of no known format. Expected one of {', '.join(FORMATS)}; name it with --from to see what is missing."
    )


def open_weights(path: Path | str, overrides: Overrides | None = None, *, format_name: str = "auto") -> Weights:
    """Weights of any format, checked to be a complete model; nothing but names and shapes is read yet.

    Args:
        path: file or directory.
        overrides: what the weights do not say.
        format_name: a key of `FORMATS`, or `auto`.
    """
    path = Path(path)
    name = detect_format(path) if format_name == "auto" else format_name
    try:
        return FORMATS[name].read(path, overrides or Overrides())
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from None
