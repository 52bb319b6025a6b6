"""tools/plot_run.py: what counts of a metrics.jsonl, and the curve in the terminal and as a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from pangu import plot as plot_run
from pangu.errors import InputError
from pangu.training import curves as curves_of_runs


def write_metrics(directory: Path, *metrics: dict[str, float], tail: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + tail, encoding="utf-8")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    steps = [{"step": step, "loss": 7.0 - step / 20} for step in range(1, 101)]
    return write_metrics(tmp_path / "run", *steps, {"step": 100, "validation_loss": 2.25, "validation_perplexity": 9.49})


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
    try:
        plot_run.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_a_step_done_again_counts_with_its_last_line(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 3.5), (3, 2.5))]
    curves = curves_of_runs.read_run(write_metrics(tmp_path, *lines))
    assert curves.training == {1: 5.0, 2: 3.5, 3: 2.5}
    assert curves.notes == []


def test_training_and_validation_are_told_apart(run: Path) -> None:
    curves = curves_of_runs.read_run(run)
    assert len(curves.training) == 100
    assert curves.validation == {100: 2.25}


def test_lines_cut_by_a_kill_are_left_out_with_a_note(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, {"step": 1, "loss": 5.0}, tail='{"step": 2, "lo\n{"step": 2, "loss": 4.0}\n{"step": 3')
    curves = curves_of_runs.read_run(run)
    assert curves.training == {1: 5.0, 2: 4.0}
    assert ["line 2 was cut off" in curves.notes[0], "line 4 was cut off" in curves.notes[1]] == [True, True]


def test_a_loss_that_is_not_finite_is_left_out_with_a_note(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, {"step": 1, "loss": 5.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf})
    curves = curves_of_runs.read_run(run)
    assert curves.training == {1: 5.0}
    assert len(curves.notes) == 2 and "step 2" in curves.notes[0]


def test_the_chart_falls_from_the_top_left_to_the_bottom_right(run: Path) -> None:
    lines = curves_of_runs.terminal_chart(curves_of_runs.read_run(run).training, width=40, height=8, braille=False).splitlines()
    assert lines[0].startswith("6.950 |*") and lines[7].startswith("2.000 |")
    assert [line.index("*") for line in lines[:8]] == sorted(line.index("*") for line in lines[:8])
    assert lines[7].rindex("*") == len("2.000 |") + 39
    assert lines[9].split() == ["step", "1", "100"]


@pytest.mark.parametrize("series", [{7: 1.5}, {1: 2.0, 2: 2.0}])
def test_the_chart_of_a_point_or_a_level_line(series: dict[int, float]) -> None:
    assert "*" in curves_of_runs.terminal_chart(series, braille=False)


def test_braille_dots_are_where_the_values_are() -> None:
    chart = curves_of_runs.terminal_chart({1: 1.0, 2: 0.0}, width=1, height=2)
    assert [line[-1] for line in chart.splitlines()[:2]] == ["\u2801", "\u2880"]  # top left dot, bottom right dot


@pytest.mark.parametrize(("encoding", "ascii_only"), [("utf-8", False), ("ascii", True)])
def test_the_terminals_encoding_chooses_the_chart(run: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, ascii_only: bool) -> None:
    with open(run / "out", "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(monkeypatch, run) == 0
    printed = (run / "out").read_text(encoding=encoding)
    assert "training loss" in printed and "validation loss: 2.2500 at step 100" in printed
    assert printed.isascii() == ascii_only


def test_the_picture_shows_all_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    other = write_metrics(tmp_path / "other", {"step": 1, "loss": 3.0})
    assert main(monkeypatch, run, other, "--output", tmp_path / "new/loss.png") == 0
    assert (tmp_path / "new/loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'pangu-alpha-pytorch\[monitor\]'"):
        plot_run.save_picture([curves_of_runs.read_run(run)], run / "loss.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "cannot be read"),
        (["empty"], "no step with a finite loss"),
        (["run", "--output", "loss.txt"], "ends in .png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_metrics(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
