"""Reading the run's configuration: one YAML file, plus `section.key=value` overrides.

config = load_config("ds_configs/2.6B.yaml", ["train.steps=100", "optimizer.lr=5e-5"])
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from pangu.config.foreign_names import FOREIGN_NAMES
from pangu.config.parsing import apply_override, first_problem, read_json, read_yaml
from pangu.config.presets import MODEL_PRESETS
from pangu.config.recipes import find_recipe
from pangu.config.schema import Config
from pangu.errors import InputError


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, or the recipe of that name (`2.6B`), and apply `section.key=value` overrides, left to right.

    A value is written as in YAML.

    Raises:
        InputError: names the file or the override, the key, what was found and what to do.
    """
    path = find_recipe(path)
    values = read_yaml(path)
    overridden = [apply_override(values, override) for override in overrides or []]
    return parse_config(values, path, overridden)


def parse_config(values: dict[str, Any], path: Path, overridden: Sequence[str] = ()) -> Config:
    """Build the configuration from sections of plain values.

    Args:
        values: the content of the YAML file: section -> key -> value.
        path: path of the YAML file, for errors; a relative `deepspeed` path is resolved against its folder.
        overridden: keys that were given on the command line.

    Raises:
        InputError: as `load_config`.
    """
    values = {key: {} if value is None and key != "deepspeed" else value for key, value in values.items()}  # a section may be empty
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = (path.parent / values["deepspeed"]).resolve()
        _take_zero_stage(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        _refuse(error, path, overridden)


def _take_zero_stage(values: dict[str, Any]) -> None:
    """If only the DeepSpeed JSON names a ZeRO stage, the run uses that stage."""
    zero = read_json(values["deepspeed"]).get("zero_optimization")
    parallel = values.setdefault("parallel", {})
    if isinstance(zero, dict) and isinstance(parallel, dict) and zero.get("stage", "auto") != "auto":
        parallel.setdefault("zero_stage", zero["stage"])


def nearest_keys(unknown: str) -> list[str]:
    """What a user may have meant by a key or a name that is unknown: `train.lr`, `learning_rate` and `--lr` are all optimizer.lr.

    The same name in any section, or what other programs call so; else names that are similar; else all keys of the section it was in.
    """
    sections = {name: list(getattr(field.annotation, "model_fields", ())) for name, field in Config.model_fields.items()}
    section, _, last = unknown.lower().lstrip("-").replace("-", "_").rpartition(".")

    def named(name: str) -> list[str]:
        return [f"{section}.{name}" for section, keys in sections.items() if name in keys]

    if exact := named(last):
        return exact
    if last in FOREIGN_NAMES:
        return [FOREIGN_NAMES[last]]
    if not section and (similar := difflib.get_close_matches(last, sections)):
        return similar
    similar = difflib.get_close_matches(last, dict.fromkeys(key for keys in sections.values() for key in keys))
    foreign = [FOREIGN_NAMES[name] for name in difflib.get_close_matches(last, FOREIGN_NAMES, 1)]
    keys = [f"{section}.{key}" for key in sections.get(section, ())]
    return [key for name in similar for key in named(name)] or foreign or keys or list(sections)


def _refuse(error: ValidationError, path: Path, overridden: Sequence[str]) -> NoReturn:
    """Turn pydantic's report into one line about the first mistake, with the keys that may have been meant."""
    kind, key, text, more = first_problem(error)
    if kind == "extra_forbidden":
        text += f" Nearest: {', '.join(nearest_keys(key))}."
    elif kind == "missing" and key.startswith("model"):
        text += f" Or give model.preset: {', '.join(MODEL_PRESETS)}."
    unknown_section = kind == "extra_forbidden" and any(name.startswith(f"{key}.") for name in overridden)
    from_override = unknown_section or any(key == name or key.startswith(f"{name}.") for name in overridden)
    raise InputError(f"{'override' if from_override else path}: {text}{more}")
