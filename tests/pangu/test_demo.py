"""The demo's parts; the whole of it is `make demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pangu.demo import MARKER, SHOWN, StageError, fresh, launcher, report, run, same
from pangu.errors import InputError


def test_a_directory_is_emptied_only_if_a_demo_made_it(tmp_path: Path) -> None:
    made, other = tmp_path / "runs/demo", tmp_path / "other"
    fresh(made)
    (made / "weights").write_text("old")
    fresh(made)
    assert [file.name for file in made.iterdir()] == [MARKER]
    other.mkdir()
    fresh(other)  # there is nothing to lose
    (other / MARKER).unlink()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="files that the demo did not make"):
        fresh(other)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="cannot be made afresh"):
        fresh(other / "thesis.txt/below")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("成都。", "成都", True), (" 你好，世界！ ", "你好,世界!", True), ("成都", "重庆", False), ("8", "18", False), ("", "。", True)],
)
def test_answers_are_compared_but_for_what_the_tokenizer_folds(one: str, other: str, equal: bool) -> None:
    assert same(one, other) is equal


def test_the_report_counts_by_kind_and_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"question": question, "answer": "对", "kind": f"kind {number % 2}"} for number, question in enumerate(SHOWN)]
    share = report(asked, ["对。", "错", *["对"] * (len(SHOWN) - 2)])
    printed = capsys.readouterr().out
    assert share == pytest.approx(1 - 1 / len(SHOWN))
    assert "kind 0" in printed and f"{len(SHOWN) // 2:>4} of" in printed and printed.count("wrong: ") == 1
    assert f"wrong: {SHOWN[1]} '错', expected '对'" in printed


def test_a_stage_that_fails_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    run(sys.executable, "-c", "import os; print(os.environ['WORD'])", WORD="told")
    assert capfd.readouterr().out.endswith("told\n")
    with pytest.raises(StageError, match="exit code 3"):
        run(sys.executable, "-c", "raise SystemExit(3)")
    assert launcher(2)[-2:] == ["--nproc-per-node", "2"]
