"""Converts weights from any format into any other; the output appears complete or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pangu.conversion.formats import FORMATS
from pangu.conversion.weights import Weights, WriteOptions
from pangu.errors import InputError
from pangu.files import lock, publish, recover, remove, remove_leftovers, work_path
from pangu.tensor_files.lazy_tensor import LazyTensor

_HINTS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EFBIG: "Raise the limit (`ulimit -f`), or choose a file system that holds such files",
}


def convert(
    weights: Weights, to: str, output: Path, options: WriteOptions, *, force: bool = False, advance: Callable[[int], None] | None = None
) -> None:
    """Write weights in another format.

    Args:
        weights: the opened weights.
        to: name of the output format: a key of `FORMATS` that can be written.
        output: a file or directory, depending on the format. It appears when it is complete and on disk.
        options: options of the writer.
        force: replace an existing output.
        advance: called with the bytes of each tensor as it is read.

    Raises:
        InputError: if the format is only read, the output exists, or it cannot be written; nothing is left behind.
    """
    write = FORMATS[to].write
    if write is None:
        writable = ", ".join(name for name, candidate in FORMATS.items() if candidate.write)
        raise InputError(f"--to {to}: this format is only read. Choose one of {writable}.")
    if weights.optimizer and not FORMATS[to].keeps_optimizer:
        keepers = ", ".join(name for name, candidate in FORMATS.items() if candidate.keeps_optimizer)
        raise InputError(f"--to {to}: cannot hold optimizer states. Choose {keepers}, or leave out --with-optimizer.")
    if not output.name or output.name == "..":
        raise InputError(f"{output}: is not a valid name for an output.")
    partial = work_path(output)

    def watched(tensors: Mapping[str, LazyTensor], options: WriteOptions) -> dict[str, LazyTensor]:
        return {name: _watched(name, tensor, options, advance or (lambda read: None)) for name, tensor in tensors.items()}

    optimizer = {state: watched(tensors, WriteOptions()) for state, tensors in weights.optimizer.items()}  # these keep their type
    weights = replace(weights, tensors=watched(weights.tensors, options), optimizer=optimizer)
    parents = list(output.parents)
    try:
        parents = [parent for parent in parents if not parent.exists()]  # made here, so removed here if nothing comes into them
        output.parent.mkdir(parents=True, exist_ok=True)
        with lock(output):
            recover(output)
            if os.path.lexists(output):
                if not force:
                    raise InputError(f"{output}: exists already. Name another output, or give --force to replace it.")
                _refuse_foreign(output, weights)
            remove_leftovers(output)
            try:
                write(weights, partial, options)
                publish(partial, output)
            finally:
                remove(partial)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "Choose a place that can be written")
        raise InputError(f"{output}: cannot be written ({error.strerror or error}). {hint}; nothing was left behind.") from None
    finally:
        for parent in parents:
            with suppress(OSError):
                parent.rmdir()


def _refuse_foreign(output: Path, weights: Weights) -> None:
    """Refuse to replace an output that holds the input, or anything but what a converter has written.

    Raises:
        InputError: naming what would be lost.
    """
    resolved = output.resolve()
    for source in (*weights.files, *filter(None, [weights.tokenizer])):
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise InputError(f"{output}: holds the input, {source.name}, which --force would remove. Name another output.")
    if output.is_symlink() or not output.is_dir():
        single = [known for known in FORMATS.values() if known.write and not known.written_names]
        strangers = [output] if output.is_symlink() or not any(known.detect(output) for known in single) else []
    else:
        names = re.compile("|".join(known.written_names for known in FORMATS.values() if known.written_names))
        entries = (entry for entry in sorted(output.rglob("*")) if entry.is_symlink() or not entry.is_dir())
        strangers = [entry for entry in entries if entry.is_symlink() or not names.fullmatch(entry.relative_to(output).as_posix())]
    if strangers:
        raise InputError(f"{strangers[0]}: was not written by a conversion, and --force would remove it. Name another output.")


def _watched(name: str, tensor: LazyTensor, options: WriteOptions, advance: Callable[[int], None]) -> LazyTensor:
    """Wrap a tensor so that its reads are reported to `advance`, and values that the new dtype would turn into infinity are refused."""

    def read() -> Tensor:
        try:
            value = tensor.read()
        except OSError as error:
            raise InputError(f"{error.filename or name}: cannot be read any more ({error.strerror or error}).") from None
        advance(value.nbytes)
        if options.dtype == torch.float16 and value.dtype != torch.float16 and value.numel():
            highest = max(abs(float(bound)) for bound in value.aminmax())
            if highest > torch.finfo(torch.float16).max:
                raise InputError(
                    f"{name}: holds {highest:.4g}, which is more than fp16 can hold. Give --dtype bf16 or fp32, or leave it out."
                )
        return value

    return replace(tensor, read=read, read_part=None)
