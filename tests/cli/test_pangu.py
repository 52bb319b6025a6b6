"""The command `pangu`: its table, its verbs, recipes and clusters by name from any folder, and the notebook's door."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.__main__ import VERBS, main

ROOT = Path(__file__).parents[2]


def pangu(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pangu", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_verb_the_table_is_printed(tmp_path: Path) -> None:
    done = pangu(folder=tmp_path)
    assert done.returncode == 0 and all(f"\n  {verb} " in done.stdout for verb in VERBS)


def test_version_and_an_unknown_verb(tmp_path: Path) -> None:
    assert pangu("--version", folder=tmp_path).stdout == "pangu 0.1.0\n"
    done = pangu("trian", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: pangu trian: unknown. Choose one of train, ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported torch already; the tests around it start one each."""
    monkeypatch.setattr(sys, "argv", ["pangu", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out.startswith("usage: ")


def test_recipes_and_clusters_are_found_by_name_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "13B").mkdir()  # somebody's weights: no recipe
    done = pangu("train", "--dry-run", "--config", "13B", "--world-size", "1024", folder=tmp_path)
    assert done.returncode == 0 and "parameters: 12,800,870,400 in all" in done.stdout, done.stderr
    done = pangu("plan", "--model", "350M", "--cluster", "a100_80", "--devices", "8", folder=tmp_path)
    assert done.returncode == 0 and "8 devices of a100_80" in done.stdout, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["13B"]


def test_an_unknown_recipe_is_refused_by_name(tmp_path: Path) -> None:
    done = pangu("train", "--dry-run", "--config", "14B", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: 14B: cannot be read"), done.stderr


def test_the_package_offers_what_a_notebook_needs_and_imports_it_late() -> None:
    code = (
        "import sys, pangu; assert 'torch' not in sys.modules; from pangu import PanguTokenizer, TextGenerator, load_weights; pangu.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'pangu' has no attribute 'nothing'")
