"""Runs a task: makes one record per example, the same for any number of processes.

Records are written to a JSONL file as they are made; its first line describes the run. A run that was killed continues after the
last complete line; a file of another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ext.collectives import all_gather_objects, broadcast_object
from megatron_ext.topology import Groups
from pangu.errors import InputError
from pangu.evaluation.answering import Record
from pangu.evaluation.examples import Example
from pangu.files import append_to, write_durably

EXAMPLES_A_ROUND = 32
"""Number of examples that each copy of the model processes between two writes; a kill loses at most these, and batches are made of them."""


def evaluation_order(count: int, seed: int, limit: int | None) -> list[int]:
    """Numbers of the examples to evaluate, in order: all shuffled by the seed, of which the first `limit` are taken.

    A limited run thus gets a fair sample, and a longer one with the same seed continues it.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order[:limit]


def run(
    answer: Callable[[Sequence[tuple[int, Example]]], list[Record]],
    examples: Sequence[Example],
    order: Sequence[int],
    groups: Groups,
    path: Path,
    header: Record,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Record]:
    """Evaluate the examples of `order` that have no record in `path` yet.

    Args:
        answer: `Answerer.answer` of this rank.
        examples: all examples of the data.
        order: numbers of the examples to evaluate.
        groups: this rank's process groups. Each data-parallel rank takes one part of a round; global rank 0 writes.
        path: the records file.
        header: first line of the file: everything that the records depend on.
        advance: called with the number of further records that were found or made.

    Returns:
        The records of `order`, on every rank.

    Raises:
        InputError: if the file is of another run or cannot be written.
    """
    first = groups.world.rank == 0
    records: list[Record] = broadcast_object(_resume(path, header, order) if first else None, groups.world)
    advance(len(records))
    copies, tensor = groups.data.size, groups.tensor.size
    while len(records) < len(order):
        begin = len(records)
        numbers = order[begin : begin + EXAMPLES_A_ROUND * copies]
        share = -(-len(numbers) // copies)
        mine = numbers[groups.data.rank * share : (groups.data.rank + 1) * share]
        gathered = all_gather_objects(answer([(number, examples[number]) for number in mine]), groups.world)
        new = [record for of_copy in gathered[::tensor] for record in of_copy]  # the ranks of a tensor group have the same
        if first:
            _append(path, new)
        records += new
        advance(len(new))
    return records


def _resume(path: Path, header: Record, order: Sequence[int]) -> list[Record]:
    """The records of a run that was killed; the file is truncated to them, and created if it does not exist."""
    head = json.dumps(header, ensure_ascii=False, sort_keys=True)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []  # the last is not whole
        records: list[Record] = []
        if lines:
            if lines[0] != head:
                raise InputError(
                    f"{path}: holds the records of another run ({_difference(lines[0], header)}). Name another --output, or remove it."
                )
            for line, number in zip(lines[1:], order, strict=False):
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if record.get("number") != number:
                    break
                records.append(record)
        if len(records) < len(order):
            write_durably(path, "".join(f"{line}\n" for line in [head, *lines[1 : 1 + len(records)]]))
        return records
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Name another --output.") from None


def _append(path: Path, records: Sequence[Record]) -> None:
    try:
        with append_to(path) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Free some space and start again: the evaluation continues where it stopped."
        ) from None


def _difference(line: str, header: Record) -> str:
    """Message about the difference between two headers."""
    try:
        found = json.loads(line)
        key = next(key for key in {**header, **found} if found.get(key) != header.get(key))
        return f"{key} = {found.get(key)!r}, now {header.get(key)!r}"
    except (ValueError, StopIteration, AttributeError):
        return "its first line is not a header"


def fingerprint(path: Path) -> str:
    """Tells whether a directory or file of weights is still the one it was: names, sizes and times, for reading 200B would take hours."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
