"""Whatever is killed, full or damaged, and whenever: committed checkpoints can be read, and the run goes on from the last, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpointed_run import DROPOUT, Bits, train
from helpers.harness import RankError, run_distributed
from helpers.layouts import small_config, start

from megatron_ext.topology import SINGLE
from pangu.engine import manifest as manifests
from pangu.engine.checkpoint_writer import FileWriter
from pangu.engine.manifest import LATEST, MANIFEST
from pangu.errors import InputError
from pangu.training import checkpoint as saving
from pangu.training.checkpoint import CheckpointSaver, Progress, claim_directory, find_checkpoint, save_checkpoint

# --- killed at every phase of a save -----------------------------------------------------------------------------------------------------


def die_at(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process kills itself where `phase` says. The code that runs until then is the product's."""

    def die(*arguments: Any, **keywords: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, rename, durably = FileWriter._write, os.rename, saving.write_durably
    written = 0

    def write_two(writer: FileWriter, state: Any, path: Path) -> None:
        nonlocal written
        written += 1
        if written > 2:
            path.write_bytes(b"half a file")
            die()
        write(writer, state, path)

    if phase == "before its files":
        monkeypatch.setattr(FileWriter, "_write", die)
    elif phase == "between its files":
        monkeypatch.setattr(FileWriter, "_write", write_two)
    elif phase == "before the vote":
        monkeypatch.setattr(FileWriter, "finish", die)
    elif phase in ("before the manifest", "before latest"):
        home, name = (manifests, MANIFEST) if phase == "before the manifest" else (saving, LATEST)
        monkeypatch.setattr(home, "write_durably", lambda path, text: die() if path.name == name else durably(path, text))
    elif phase == "before the rename":
        monkeypatch.setattr(os, "rename", lambda a, b: die() if str(a).endswith(".partial") else rename(a, b))
    elif phase == "before old ones go":
        monkeypatch.setattr(saving, "_retire", die)
    elif phase == "while old ones go":
        monkeypatch.setattr(saving, "remove", lambda path: die() if path.suffix == ".removing" and path.exists() else None)
    else:
        raise AssertionError(phase)


def train_and_die(directory: str, parallel: dict[str, Any], phase: str, rank: int, background: bool) -> None:
    """Resume from step 2 and die while step 4 is saved."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if int(os.environ["RANK"]) == rank:
            save = CheckpointSaver.save

            def armed(saver: CheckpointSaver, progress: Progress) -> None:
                die_at(phase, monkeypatch)
                save(saver, progress)

            monkeypatch.setattr(CheckpointSaver, "save", armed)
        train(directory, parallel, [4], 4, {"keep": 1, "async_save": background})


LAYOUT = {"tensor": 2, "pipeline": 2}
PHASES = {  # phase: ranks that may die there, and whether step 4 counts
    "before its files": ([0, 3], False),
    "between its files": ([0, 3], False),
    "before the vote": ([0, 3], False),
    "before the manifest": ([0], False),
    "before the rename": ([0], False),
    "before latest": ([0], True),
    "before old ones go": ([0], True),
    "while old ones go": ([0], True),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bits]:
    """A run that has saved step 2, and the six steps of one that is never interrupted."""
    root = tmp_path_factory.mktemp("begun")
    unbroken = run_distributed(train, 4, str(root / "unbroken"), LAYOUT, [], 6)[0]
    assert run_distributed(train, 4, str(root / "begun"), LAYOUT, [2], 2)[0] == unbroken[:2]
    return root / "begun", unbroken


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize(("phase", "rank"), [(phase, rank) for phase, (ranks, _) in PHASES.items() for rank in ranks])
def test_a_kill_costs_no_more_than_the_checkpoint_it_hits(
    phase: str, rank: int, background: bool, begun: tuple[Path, Bits], tmp_path: Path
) -> None:
    shutil.copytree(begun[0], tmp_path / "run")
    with pytest.raises(RankError):
        run_distributed(train_and_die, 4, str(tmp_path / "run"), LAYOUT, phase, rank, background, timeout=60)
    resumed = run_distributed(train, 4, str(tmp_path / "run"), LAYOUT, [6], 6, {"keep": 1})[0]
    assert resumed == begun[1][4 if PHASES[phase][1] else 2 :]
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("step_")] == ["step_00000006"]
    assert (tmp_path / "run" / LATEST).read_text() == "step_00000006\n"


def save_again(directory: str, dies: bool) -> None:
    """Save step 2 of a run that has it already; a kill comes when the old one has lost its name and the new one has none."""
    engine = start(small_config(model=DROPOUT, checkpoint={"dir": directory, "keep": 1}))
    rename = os.rename

    def rename_or_die(one: Any, other: Any) -> None:
        if dies and str(one).endswith(".partial"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(one, other)

    os.rename = rename_or_die
    save_checkpoint(engine, Progress(step=2))


def test_the_only_checkpoint_survives_being_replaced(tmp_path: Path) -> None:
    run_distributed(train, 1, str(tmp_path / "run"), {}, [2], 2, {"keep": 1})
    expected = (tmp_path / "run/step_00000002" / MANIFEST).read_text()
    with pytest.raises(RankError):
        run_distributed(save_again, 1, str(tmp_path / "run"), True)
    assert not (tmp_path / "run/step_00000002").exists()
    config = small_config(checkpoint={"dir": str(tmp_path / "run")})
    with claim_directory(config, SINGLE):
        assert find_checkpoint(config, SINGLE) == tmp_path / "run/step_00000002"
    assert (tmp_path / "run/step_00000002" / MANIFEST).read_text() == expected
    run_distributed(save_again, 1, str(tmp_path / "run"), False)
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_00000002"]
    assert (tmp_path / "run/step_00000002" / MANIFEST).read_text() != expected


# --- a disk that is full -----------------------------------------------------------------------------------------------------------------


def save_beyond_a_limit(directory: str, rank: int, background: bool) -> list[str]:
    """Save step 1; then `rank` can write no more than 4 KB a file, and step 2 fails; then the limit is lifted, and step 3 is saved."""
    config = small_config(parallel={"tensor": 2}, checkpoint={"dir": directory, "async_save": background})
    engine = start(config)
    saver = CheckpointSaver(engine)
    saver.save(Progress(step=1))
    saver.finish()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.groups.world.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    told = []
    try:
        saver.save(Progress(step=2))
        saver.finish()
    except InputError as error:
        told.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    saver.save(Progress(step=3))
    saver.finish()
    return told


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_write_is_told_on_all(rank: int, background: bool, tmp_path: Path) -> None:
    told = run_distributed(save_beyond_a_limit, 2, str(tmp_path / "run"), rank, background, timeout=60)
    assert told[0] == told[1] and len(told[0]) == 1
    assert f"rank {rank}: " in told[0][0] and "last good checkpoint is untouched" in told[0][0] and "\n" not in told[0][0]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*[0-9]")) == ["step_00000001", "step_00000003"]
    assert find_checkpoint(small_config(checkpoint={"dir": str(tmp_path / "run")}), SINGLE) == tmp_path / "run/step_00000003"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(directory: str) -> tuple[int, list[str]]:
    """Save until the disk is full: the last step saved, and what was told."""
    engine = start(small_config(checkpoint={"dir": directory, "keep": 100}))
    for step in range(1, 100):
        try:
            save_checkpoint(engine, Progress(step=step))
        except InputError as error:
            return step - 1, [str(error)]
    return 99, []


def test_a_full_disk_leaves_what_was_saved(small_disk: Path) -> None:
    saved, told = run_distributed(fill, 1, str(small_disk / "run"))[0]
    assert saved >= 1 and "last good checkpoint is untouched" in told[0] and "Free some space" in told[0]
    newest = small_disk / f"run/step_{saved:08d}"
    assert find_checkpoint(small_config(checkpoint={"dir": str(small_disk / "run")}), SINGLE) == newest


def test_what_cannot_be_removed_stays_whole(tmp_path: Path) -> None:
    """A checkpoint that is too old, on which a file system is mounted: it cannot even be renamed."""
    run_distributed(train, 1, str(tmp_path / "run"), {}, [1], 1)
    place = tmp_path / "run/step_00000001"
    if subprocess.run(["mount", "--bind", str(place), str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert len(run_distributed(train, 1, str(tmp_path / "run"), {}, [2, 3], 3, {"keep": 1})[0]) == 2
        assert {path.name for path in (tmp_path / "run").glob("step_*")} == {"step_00000001", "step_00000003"}
        config = small_config(checkpoint={"dir": str(tmp_path / "run"), "resume": str(tmp_path / "run/step_00000001")})
        with pytest.raises(InputError, match="checkpoints would mix"):
            find_checkpoint(config, SINGLE)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# --- files that have changed -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of a pipeline and of ZeRO-3, which between them have every kind of file."""
    root = tmp_path_factory.mktemp("kinds")
    run_distributed(train, 2, str(root / "pipeline"), {"pipeline": 2}, [1, 2], 2)
    run_distributed(train, 2, str(root / "zero3"), {"zero_stage": 3}, [1, 2], 2)
    return {"pipeline": root / "pipeline", "zero3": root / "zero3"}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


FILES = [
    ("pipeline", "layer_03-model_00-model_states.pt"),
    ("pipeline", "mp_rank_01_model_states.pt"),
    ("pipeline", "zero_pp_rank_0_mp_rank_01_optim_states.pt"),
    ("pipeline", "rng_rank_00001.pt"),
    ("pipeline", MANIFEST),
    ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
]


@pytest.mark.parametrize("harm", [flip, halve, os.remove], ids=["one bit", "half", "gone"])
@pytest.mark.parametrize(("run", "name"), FILES)
def test_a_changed_file_is_named_and_the_step_before_is_taken(
    run: str, name: str, harm: Any, kinds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kinds[run], tmp_path / "run")
    victim = tmp_path / "run/step_00000002" / name
    harm(victim)
    config = small_config(checkpoint={"dir": str(tmp_path / "run")})
    assert find_checkpoint(config, SINGLE) == tmp_path / "run/step_00000001"
    assert name in capsys.readouterr().out
    assert (tmp_path / "run/step_00000002.damaged").is_dir()


@pytest.mark.parametrize("content", ["step_00000099", "rubbish", "", "../../elsewhere"])
def test_latest_is_never_believed(content: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kinds["zero3"], tmp_path / "run")
    (tmp_path / "run" / LATEST).write_text(content)
    assert find_checkpoint(small_config(checkpoint={"dir": str(tmp_path / "run")}), SINGLE) == tmp_path / "run/step_00000002"


# --- one run at a time -------------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from helpers.layouts import small_config
from megatron_ext.topology import SINGLE
from pangu.training.checkpoint import claim_directory
with claim_directory(small_config(checkpoint={"dir": sys.argv[1]}), SINGLE):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    config = small_config(checkpoint={"dir": str(tmp_path / "run")})
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (tmp_path / "run/step_00000005.partial").mkdir()  # the other one is writing it
        with pytest.raises(InputError, match=f"run: process {other.pid} on .* is writing it"), claim_directory(config, SINGLE):
            pass
        assert (tmp_path / "run/step_00000005.partial").is_dir()
    finally:
        other.kill()  # without a chance to tidy up
        other.communicate()
    with claim_directory(config, SINGLE):
        assert not (tmp_path / "run/step_00000005.partial").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- in the background -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(4, LAYOUT), (2, {"zero_stage": 3}), (2, {"zero_stage": 2}), (1, {"zero_stage": 0})], ids=str
)
def test_files_written_in_the_background_are_the_same_bytes(ranks: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    """Training goes on meanwhile, and the next save comes at once."""
    results = [
        run_distributed(train, ranks, str(tmp_path / name), parallel, [2, 3], 4, {"keep": 3, "async_save": background})[0]
        for name, background in (("at once", False), ("behind", True))
    ]
    assert results[0] == results[1]
    for step in ("step_00000002", "step_00000003"):
        ours, theirs = (json.loads((tmp_path / name / step / MANIFEST).read_text()) for name in ("at once", "behind"))
        assert ours == theirs and len(ours["files"]) > ranks
