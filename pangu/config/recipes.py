"""Finds the recipes, cluster files and DeepSpeed JSON files that come with the project, by name."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[2] / "ds_configs"
"""In a checkout beside `pangu/`; an installed wheel has it there too."""
CLUSTERS = RECIPES / "clusters"


def find_recipe(name: Path | str) -> Path:
    """The path of a recipe, given as a path or as the name of a recipe in ds_configs/, such as `2.6B`."""
    return _find(Path(name), RECIPES)


def find_cluster(name: Path | str) -> Path:
    """The path of a cluster file, given as a path or as the name of a file in ds_configs/clusters/, such as `a100_80`."""
    return _find(Path(name), CLUSTERS)


def _find(path: Path, folder: Path) -> Path:
    """The path if it is a file, else the file of that name in the folder; else the path unchanged, so that the caller's error names it."""
    named = folder / f"{path}.yaml"
    return named if not path.is_file() and path.name == str(path) and named.is_file() else path
