"""Text to plain values: YAML and JSON files and command-line overrides, with every mistake told in one line."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pangu.errors import InputError
from pangu.files import parse_json, read_text

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without four surprises: references, of which some hundred bytes make gigabytes; the last of two equal keys
    winning in silence; dates; and 10:30 being the number 630.

    The last two are text here.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} refers to another value; write it out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_plain_text(self, node: yaml.ScalarNode) -> str:
        return node.value

    def construct_decimal(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_plain_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names its origin in errors.

    Raises:
        InputError: not valid YAML, or a key given twice.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or " ".join(str(error).split())
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{where}: {line}{problem}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; one without content is empty.

    Raises:
        InputError: the file cannot be read, is not valid YAML, or holds something else than sections.
    """
    values = parse_yaml(_read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: sections such as 'model:' are expected, found {'nothing' if values is None else repr(values)}.")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, is not valid JSON, or holds something else than an object.
    """
    try:
        values = parse_json(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid JSON ({error.msg}).") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: an object in braces is expected, found {values!r}.")
    return values


class Problem(NamedTuple):
    """A mistake that pydantic found."""

    kind: str
    """Pydantic's name of it: `missing`, `extra_forbidden`, ..."""
    key: str
    text: str
    """One sentence."""
    more: str
    """How many further mistakes there are; empty if none."""


def first_problem(error: ValidationError) -> Problem:
    """The first mistake of pydantic's report; a misspelt key comes before the missing one that it leaves."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        text = f"unknown key {key}."
    elif problem["type"] == "missing":
        text = f"{key} is missing."
    elif problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
    elif problem["type"] == "model_type":
        text = f"{key} = {problem['input']!r}, but a section of keys is expected."
    else:
        text = f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
    return Problem(problem["type"], key, text, f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def read_model(path: Path | str, kind: type[Model]) -> Model:
    """What a YAML file holds, as a pydantic model.

    Raises:
        InputError: one line naming the file, the key, what was found and what is expected.
    """
    path = Path(path)
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(f"{path}: {problem.text}{problem.more}") from None


def apply_override(values: dict[str, Any], override: str) -> str:
    """Write one `section.key=value` into nested `values`; returns its key.

    Raises:
        InputError: it has no `=`, or its section is a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: section.key=value is expected, such as train.steps=100.")
    *sections, last = key.split(".")
    block = values
    for section in sections:
        if block.get(section) is None:
            block[section] = {}
        block = block[section]
        if not isinstance(block, dict):
            raise InputError(f"override {override!r}: {section} is not a section.")
    block[last] = parse_yaml(text, f"override {override!r}")
    return key


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text.") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; a configuration has fewer.") from None
