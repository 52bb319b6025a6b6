"""The form of examples that every reader returns, and checked reading of data files, which are refused in one line if damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu.errors import InputError
from pangu.files import open_file


@dataclass(frozen=True)
class Choice:
    """One of the answers that an example offers."""

    label: str
    """Name of the choice in the records; for a blank's candidates, their number."""
    word: str
    """Text of the choice: `{word}` in the templates."""


@dataclass(frozen=True)
class Example:
    """One question of a dataset."""

    id: str
    fields: Mapping[str, str]
    """Values of the fields that the templates of tasks.yaml name in braces."""
    choices: tuple[Choice, ...] = ()
    gold: int = 0
    """Index of the right choice."""
    answers: tuple[str, ...] = ()
    """Right answers of a generation task; few-shot examples show the first."""
    subset: str = ""
    """The part of the data that the example is from, if figures are reported per part."""


@dataclass(frozen=True)
class Place:
    """A value of a parsed file with its path in the file, for error messages."""

    value: Any
    where: str

    def __getitem__(self, key: str) -> Place:
        """The value under a key of an object."""
        if not isinstance(self.value, dict) or key not in self.value:
            found = f"the keys {', '.join(map(str, self.value)) or '(none)'}" if isinstance(self.value, dict) else _kind(self.value)
            raise InputError(f"{self.where}: {key!r} expected, {found} found. {_CHECK}")
        return Place(self.value[key], f"{self.where}, {key}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def items(self) -> Iterator[Place]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise InputError(f"{self.where}: a list expected, {_kind(self.value)} found. {_CHECK}")
        return (Place(value, f"{self.where}[{index}]") for index, value in enumerate(self.value))

    def pairs(self) -> Iterator[tuple[str, Place]]:
        """The keys and values of an object."""
        if not isinstance(self.value, dict):
            raise InputError(f"{self.where}: an object expected, {_kind(self.value)} found. {_CHECK}")
        return ((key, Place(value, f"{self.where}, {key}")) for key, value in self.value.items())

    def text(self) -> str:
        """The value as text; a whole number is accepted too, because labels are written both ways."""
        if isinstance(self.value, bool) or not isinstance(self.value, (str, int)):
            raise InputError(f"{self.where}: a text expected, {_kind(self.value)} found. {_CHECK}")
        text = str(self.value)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(f"{self.where}: half of a surrogate pair found, which no tokenizer takes. {_CHECK}")
        return text

    def index(self, length: int) -> int:
        """The value as a whole number from 0 to `length` - 1."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not 0 <= self.value < length:
            raise InputError(f"{self.where}: a number of 0 to {length - 1} expected, {str(self.value)[:40]!r} found. {_CHECK}")
        return self.value

    def refuse(self, expected: str) -> InputError:
        """The InputError for a value that is not what was expected."""
        return InputError(f"{self.where}: {expected} expected, {str(self.value)[:80]!r} found. {_CHECK}")


_CHECK = "Is it the file of this task, and whole?"


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names[type(value)]


def read_text(path: Path) -> str:
    """A file's UTF-8 text, without a byte order mark and with "\\n" line ends. Raises InputError if it is not UTF-8."""
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start:,} is not UTF-8. Fetch the file again, unpacked.") from None


def read_json(path: Path) -> Place:
    """A file that is one JSON value."""
    return Place(_parse(read_text(path), str(path)), str(path))


def read_json_lines(path: Path) -> Iterator[Place]:
    """The objects of a file with one JSON object per line; blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield Place(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply. {_CHECK}") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}). {_CHECK}") from None
