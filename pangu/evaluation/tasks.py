"""The tasks described in tasks.yaml, and how their data files are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pangu.config.parsing import read_yaml
from pangu.errors import InputError

DESCRIPTIONS = Path(__file__).with_name("tasks.yaml")


@dataclass(frozen=True)
class Task:
    """One entry of tasks.yaml; the head of that file explains the fields."""

    name: str
    kind: Literal["choice", "generate", "perplexity"]
    reader: str
    files: Mapping[str, Any]
    context: str = ""
    scored: str = ""
    prompt: str = ""
    solved: str = ""
    long: str = ""
    keep: Literal["begin", "end"] = "begin"
    fields: tuple[str, ...] = ()
    label: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    offered: int = 0
    other_blanks: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("accuracy",)
    paper: Mapping[str, Any] | None = None


def load_tasks() -> dict[str, Task]:
    """All tasks by name."""
    return {name: Task(name=name, **description) for name, description in read_yaml(DESCRIPTIONS).items()}


@dataclass(frozen=True)
class Files:
    """The files of a task."""

    evaluate: list[Path]
    train: list[Path]
    """Files with the few-shot examples; may be empty."""


def find_files(task: Task, data: Path) -> Files:
    """Find the files of a task in a directory by their official names; a path to a file is used whatever its name.

    Raises:
        InputError: if there is none.
    """
    if not data.exists():
        raise InputError(f"{data}: not found. Give the directory of the official {task.name} files, or the file itself.")
    folder = data if data.is_dir() else data.parent
    there = {part: [folder / name for name in task.files[part] if (folder / name).is_file()] for part in ("evaluate", "train")}
    if not task.files.get("all"):
        there = {part: paths[:1] for part, paths in there.items()}
    evaluate = there["evaluate"] if data.is_dir() else [data]
    if not evaluate:
        raise InputError(
            f"{data}: none of {', '.join(task.files['evaluate']) or 'its files'} is in it. Name the file to evaluate with --data."
        )
    return Files(evaluate, [path for path in there["train"] if path not in evaluate])
