"""The formats of weights by name, and detection of the format of a path."""

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
    """One format of weights: how to detect, read, write and verify it. The programs know nothing else about a format."""

    detect: Callable[[Path], bool]
    read: Callable[[Path, Overrides], Weights]
    write: Callable[[Weights, Path, WriteOptions], None] | None = None
    """Writes weights to a path; None if the format can only be read."""
    keeps_optimizer: bool = False
    """Whether the format can hold the optimizer's states."""
    written_names: str = ""
    """Regular expression of the names, relative to a directory, of all that the writer puts there; empty: it writes a single file."""
    says_gelu: bool = True
    """Whether written files name the model's activation function; otherwise whoever reads them must know it."""
    checksums: Checksums | None = None
    """How to verify files; None if the format keeps no checksums."""
    locate: Callable[[Path], Path] = lambda path: path
    """Gives the checkpoint that a path stands for: the path itself, or the newest checkpoint in it."""


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.detect, huggingface.read, huggingface.write, written_names=huggingface.WRITTEN_NAMES),
    "megatron": Format(megatron.detect, megatron.read, megatron.write, written_names=megatron.WRITTEN_NAMES),
    "deepspeed": Format(deepspeed.detect, deepspeed.read, checksums=deepspeed.CHECKSUMS, locate=locate),
    "mindspore-shards": Format(mindspore_shards.detect, mindspore_shards.read, checksums=mindspore.CHECKSUMS),
    "mindspore": Format(
        mindspore.detect, mindspore.read, mindspore.write, keeps_optimizer=True, says_gelu=False, checksums=mindspore.CHECKSUMS
    ),
    "npy": Format(npy.detect, npy.read, npy.write, written_names=npy.WRITTEN_NAMES, says_gelu=False),
}


def detect_format(path: Path) -> str:
    """Name of the format that a path holds, detected from its files.

    Raises:
        InputError: if the path does not exist or holds no known format.
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
    """Open weights of any format and check that they are a complete model; only names and shapes are read yet.

    Args:
        path: file or directory.
        overrides: facts about the model that the weights do not contain.
        format_name: a key of `FORMATS`, or `auto`.
    """
    path = Path(path)
    name = detect_format(path) if format_name == "auto" else format_name
    try:
        return FORMATS[name].read(path, overrides or Overrides())
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from None
