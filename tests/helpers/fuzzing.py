"""Bytes and JSON documents that no writer wrote, for tests of what reads foreign files."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helpers.mindspore_bytes import varint
from pangu.tensor_files import torch_file

EXAMPLES = int(os.environ.get("PANGU_FUZZ_EXAMPLES", "0"))


def fuzz(share: float = 1.0) -> Callable[[Any], Any]:
    """The same few examples in every run, or many new ones. `share`: of the number of examples."""
    return settings(
        max_examples=int((EXAMPLES or 100) * share),
        derandomize=not EXAMPLES,
        database=None,
        deadline=5000,
        suppress_health_check=list(HealthCheck),
    )


HUGE = [varint(2**31), varint(2**32 - 1), varint(2**62), varint(2**64 - 1), b"\xff" * 11, struct.pack("<I", 2**32 - 1)]
HUGE += [struct.pack("<I", 2**31), struct.pack("<Q", 2**32), struct.pack("<Q", 2**63), struct.pack("<q", -1), bytes(8)]
NUMBERS = st.one_of(st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, -1, -(2**63)]), st.integers(-5, 300))


@dataclass
class Edit:
    """One change of some bytes. Places are fractions, so that an edit fits every file."""

    kind: str
    begin: float
    length: int
    data: bytes

    def apply(self, old: bytes) -> bytes:
        """The changed bytes."""
        at = int(self.begin * len(old))
        end = min(len(old), at + self.length)
        if self.kind == "truncate":
            return old[:at]
        if self.kind == "delete":
            return old[:at] + old[end:]
        if self.kind == "duplicate":
            return old[:end] + old[at:end] + old[end:]
        if self.kind == "insert":
            return old[:at] + self.data + old[at:]
        if self.kind == "move":
            return old[:at] + old[end:] + old[at:end]
        return old[:at] + self.data + old[at + len(self.data) :]  # overwrite


PLACES = st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.05), st.floats(0.9, 1, exclude_max=True))
DATA = st.one_of(st.sampled_from(HUGE), st.binary(min_size=1, max_size=12), st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x01", b"\n"]))
KINDS = ["overwrite", "overwrite", "overwrite", "truncate", "delete", "duplicate", "insert", "move"]
EDITS = st.lists(st.builds(Edit, st.sampled_from(KINDS), PLACES, st.integers(1, 80), DATA), min_size=1, max_size=4)

ODD = [None, True, -1, 0, 1, 2**31, 2**62, 2**64, 10**30, 0.5, float("nan"), float("inf"), -0.0, "", "\n", "\ud800", "\0.safetensors"]
ODD += [
    "x" * 300,
    "../up",
    [],
    {},
    [[]],
    {"": 1},
    [2**62, 0],
    [0, 2**63],
    [-1],
    [1] * 17,
    "model-00001-of-00001.safetensors",
    "I64",
    "BF16",
]


@st.composite
def spoilt_json(draw: st.DrawFn, text: str) -> str:
    """A JSON document with some of its values, keys or entries changed."""
    root = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        pending = [root]
        while pending:
            node = pending.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    pending.append(node[key])
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        what = draw(st.sampled_from(["value", "key", "drop", "copy", "deep"]))
        if what == "value" or not isinstance(node, dict):
            node[key] = odd
        elif what == "drop":
            del node[key]
        elif what == "key":
            node[draw(st.sampled_from(["", "\n", "\ud800", "x" * 300, "transformer.h.9999.ln_1.weight", "\0"]))] = node.pop(key)
        elif what == "copy":
            node[f"{key}\n"] = node[key]
        else:
            for _ in range(draw(st.sampled_from([5, 400]))):
                odd = [odd]
            node[key] = odd
    return json.dumps(root)


class Spoilt:
    """A file whose bytes are others inside the `with`."""

    def __init__(self, file: Path, data: bytes) -> None:
        self.file, self.data = file, data

    def __enter__(self) -> None:
        self.original = self.file.read_bytes()
        self.file.write_bytes(self.data)

    def __exit__(self, *_: Any) -> None:
        self.file.write_bytes(self.original)


def tensors_of(root: Any) -> list[torch_file.StoredTensor]:
    """All tensors in plain containers, found without recursion."""
    found, pending, seen = [], [root], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch_file.StoredTensor):
            found.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    return found
