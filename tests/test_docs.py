"""The documents say what the code does: their commands parse, what they name exists, both READMEs give the same commands."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from pangu.config import Config, load_config
from pangu.config.layout import resolve
from pangu.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
READMES = ["README.md", "README.zh-CN.md"]
PAGES = [*READMES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SECTIONS = {name: fields for name, field in Config.model_fields.items() if (fields := getattr(field.annotation, "model_fields", None))}
FOLDERS = "pangu|megatron_ext|ds_configs|tools|tests|docs"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The fenced blocks, without comments; job directives of Slurm are none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    return [f"{language}\n" + re.sub(r"(^|\s)#(?!SBATCH|!).*", "", body) for language, body in found]


def commands(page: str) -> list[list[str]]:
    """The lines of the shell blocks, cut into words."""
    shell = "\n".join(block.partition("\n")[2] for block in blocks(page) if block.startswith("bash\n"))
    return [words for line in shell.splitlines() if not line.startswith("#") and (words := shlex.split(line))]


# Each documented command once, with the page it stands on.
COMMANDS = {shlex.join(words): (page, words) for page in PAGES for words in commands(page)}
TRAINING = {line: words for line, (_, words) in COMMANDS.items() if "pangu.train" in words}
MODULES = ("pangu.generate", "pangu.evaluate")
PROGRAMS = {
    line: words
    for line, (_, words) in COMMANDS.items()
    if set(MODULES) & set(words) or any(word.startswith("tools/") for word in words[:2])
}


def test_both_readmes_give_the_same_commands() -> None:
    english, chinese = map(blocks, READMES)
    assert english == chinese
    assert len(english) > 15


def test_both_readmes_have_the_same_sections_and_links() -> None:
    shapes = [re.findall(r"^#+(?= )", text(page), re.MULTILINE) for page in READMES]
    assert shapes[0] == shapes[1]
    links = [{link for link in re.findall(r"\]\(([^)]+)\)", text(page)) if not link.startswith("README")} for page in READMES]
    assert links[0] == links[1]


def processes(words: list[str]) -> int:
    """How many processes the launcher in a command starts."""

    def option(*names: str) -> int:
        return next((int(words[words.index(name) + 1]) for name in names if name in words), 1)

    return option("--nproc-per-node", "--num_gpus") * option("--nnodes", "--num_nodes")


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_are_accepted(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = TRAINING[line]
    arguments = words[words.index("pangu.train") + 1 :]
    if "--dry-run" not in arguments:
        arguments += ["--dry-run", "--world-size", str(processes(words))]
    monkeypatch.setattr(sys, "argv", ["pangu.train", *arguments])
    importlib.import_module("pangu.train").main()
    assert "layout: " in capsys.readouterr().out


class Parsed(Exception):
    """A command line was accepted; its program need not run."""


@pytest.mark.parametrize("line", PROGRAMS)
def test_command_lines_of_other_programs_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = PROGRAMS[line]
    original = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *words: list[str]) -> None:
        original(parser, *words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    if modules := [word for word in words if word in MODULES]:
        monkeypatch.setattr(sys, "argv", words[words.index(modules[0]) :])
        program = importlib.import_module(modules[0]).main
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        program = runpy.run_path(words[1])["main"]
    with pytest.raises(Parsed):
        program()


def test_every_command_is_known() -> None:
    """A new kind of command needs a check of its own, or a place here because nothing of ours can be wrong in it."""
    foreign = ("python3 -m venv", "mindspore-venv/bin/", "pip ", "source ", "export ", "tar ", "mkdir ", "cp ", "'HEAD=$(scontrol", "HEAD=")
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    for line, (page, words) in COMMANDS.items():
        if line in TRAINING or line in PROGRAMS or line.startswith(foreign):
            continue
        if words[0] == "make":
            assert words[1] in targets, (page, line)
        else:
            tests = words[1:2] if words[1].startswith("tests/") else words[3:]
            assert words[0].endswith("python") and (words[1:3] == ["-m", "pytest"] or tests == words[1:]), (page, line)
            assert tests and all((ROOT / word).exists() for word in tests), (page, line)


def named_keys(page: str) -> set[str]:
    """What stands in code quotes and begins with the name of a section and a dot."""
    quoted = re.findall(r"`([^`\n]+)`", text(page))
    return {word.partition("=")[0] for code in quoted for word in code.split() if re.match(rf"({'|'.join(SECTIONS)})\.[a-z_]+(=|$)", word)}


@pytest.mark.parametrize("page", PAGES)
def test_every_key_exists(page: str) -> None:
    yaml_blocks = [yaml.safe_load(block.removeprefix("yaml\n")) for block in blocks(page) if block.startswith("yaml\n")]
    written = {f"{section}.{key}" for block in yaml_blocks for section, keys in block.items() for key in keys}
    for key in named_keys(page) | written:
        section, _, name = key.partition(".")
        assert name in SECTIONS[section], f"{page}: {key}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_that_is_named_exists(page: str) -> None:
    for path, name in re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]*)(?:::(\w+))?", text(page)):
        assert (ROOT / path).exists(), f"{page}: {path}"
        assert not name or f"def {name}(" in text(path), f"{page}: {path}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.is_file(), f"{page}: {target}"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []  # a picture has none
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, f"{page}: {target}"


def test_the_errors_that_are_explained_are_in_the_code() -> None:
    sources = [path.read_text(encoding="utf-8") for folder in ("pangu", "megatron_ext") for path in (ROOT / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a message over several lines is one
    explained = re.findall(r"^\| `([^`]+)` \|", text("docs/troubleshooting.md"), re.MULTILINE)
    assert len(explained) > 8
    for message in explained:
        longest = max(re.split(r"[^a-z ]+", message), key=len).strip()
        assert longest in code, message


def test_the_table_of_keys_is_that_of_the_code() -> None:
    import config_reference

    assert config_reference.updated(text("docs/training.md")) == text("docs/training.md"), "run tools/config_reference.py"
    for section, fields in SECTIONS.items():
        assert all(f"| `{section}.{key}` |" in text("docs/training.md") for key in fields)


COMBINATIONS: dict[str, list[str]] = {
    "data parallel, fp32": [],
    "`train.precision=bf16` or `fp16`": ["train.precision=bf16"],
    "`parallel.tensor`": ["parallel.tensor=2"],
    "`parallel.sequence`, with tensor": ["parallel.tensor=2", "parallel.sequence=true"],
    "`parallel.pipeline`": ["parallel.pipeline=2"],
    "pipeline × tensor × sequence × data": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
    "`offload_optimizer` in the DeepSpeed JSON": [],
    "`offload_param` in the DeepSpeed JSON": [],
    "`parallel.recompute` `selective`, `full`": ["parallel.recompute=full"],
}


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, its head left out."""
    section = text(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)[2:]]


def test_the_table_of_combinations_is_that_of_the_code(tmp_path: Path) -> None:
    table = rows("README.md", "What combines with what")
    assert [row[0] for row in table] == list(COMBINATIONS)
    yes_or_no = [[cell[0] for cell in row[1:]] for row in rows("README.zh-CN.md", "哪些功能可以组合")]
    assert yes_or_no == [["可" if cell == "yes" else "否" for cell in row[1:]] for row in table]
    for label, *cells in table:
        offload = re.findall(r"`(offload_\w+)`", label)
        for stage, cell in enumerate(cells):
            settings = "".join(f', "{key}": {{"device": "cpu"}}' for key in offload)
            (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}{settings}}}}}', encoding="utf-8")
            overrides = ["train.precision=fp32", *COMBINATIONS[label]]  # the later one wins
            config = load_config(ROOT / "ds_configs/350M.yaml", [*overrides, f"deepspeed={tmp_path / 'ds.json'}"])
            try:
                resolve(config, 8)
                allowed = True
            except InputError:
                allowed = False
            assert allowed == (cell == "yes"), (label, stage)


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Sizes"), ("README.zh-CN.md", "模型规模")])
def test_the_table_of_sizes_is_that_of_the_recipes(page: str, heading: str) -> None:
    from pangu.config.sizes import num_parameters

    for recipe, layers, hidden, heads, parameters, layout in rows(page, heading):
        model = load_config(recipe.strip("`")).model
        said = [int(number.replace(",", "")) for number in (layers, hidden, heads, parameters)]
        assert said == [model.num_layers, model.hidden_size, model.num_heads, num_parameters(model)]
        sizes = [int(number) for number in re.findall(r"\d+", layout)]
        world_size = 1
        for size in sizes:
            world_size *= size
        topology = resolve(load_config(recipe.strip("`")), world_size).topology
        assert [size for size in (topology.tensor, topology.pipeline, topology.data) if size > 1] == sizes


@pytest.mark.parametrize("page", READMES)
def test_the_example_of_the_demo_counts_its_questions(page: str) -> None:
    from pangu.quickstart.corpus import questions

    assert f" of {sum(1 for _ in questions())} questions, " in text(page)
