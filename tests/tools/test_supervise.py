"""tools/supervise.py with commands that end as the test wants."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[1])
count = len((run / "starts").read_text()) if (run / "starts").exists() else 0
(run / "starts").write_text("x" * (count + 1))
{body}
"""


def supervise(run_dir: Path, body: str, *options: str) -> subprocess.Popen[str]:
    (run_dir / "checkpoints").mkdir()
    (run_dir / "program.py").write_text(PROGRAM.format(body=body))
    words = [sys.executable, str(run_dir / "program.py"), str(run_dir), "--config", "ds_configs/quickstart.yaml", f"run.dir={run_dir}"]
    command = [sys.executable, "tools/supervise.py", *options, "--", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def starts(run_dir: Path) -> int:
    return len((run_dir / "starts").read_text())


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_refused_is_not_started_again(tmp_path: Path, code: int) -> None:
    process = supervise(tmp_path, f"sys.exit({code})")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == code and starts(tmp_path) == 1


def test_a_crash_is_started_again_while_it_gets_on(tmp_path: Path) -> None:
    body = "(run / 'checkpoints/latest').write_text(f'step_{count}')\nsys.exit(0 if count == 4 else 1)"
    process = supervise(tmp_path, body, "--max-restarts", "1")
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 0 and starts(tmp_path) == 5
    assert errors[0] == "supervise: exit code 1; starting again from step_0" and len(errors) == 4


def test_crashes_without_a_new_checkpoint_end_it(tmp_path: Path) -> None:
    process = supervise(tmp_path, "sys.exit(7)", "--max-restarts", "2")
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 7 and starts(tmp_path) == 3
    assert errors[-1] == "supervise: exit code 7; given up after 2 restarts without a new checkpoint"


def test_a_signal_is_passed_on_and_ends_it(tmp_path: Path) -> None:
    process = supervise(tmp_path, "time.sleep(60)")
    deadline = time.monotonic() + 60
    while not (tmp_path / "starts").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 128 + signal.SIGTERM and starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("words", "expected"), [([], "the following arguments are required: -- COMMAND"), (["--", "true"], "no `--config FILE`")]
)
def test_what_cannot_be_supervised_is_refused(words: list[str], expected: str) -> None:
    command = [sys.executable, "tools/supervise.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and expected in result.stderr
