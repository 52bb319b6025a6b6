"""tools/architecture.py: every rule is shown breaches to find and lawful files to leave alone; the tree keeps all rules."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import architecture
from architecture import Finding, Sources

ROOT = Path(__file__).parents[2]
Rule = Callable[[Sources], list[Finding]]
SCHEMA = """
class Parallel:
    tensor: int = 1
class Model:
    num_heads: int
class Run:
    hang_timeout: float = 600.0
class Train:
    steps: int
class Config:
    model: Model
    parallel: Parallel = Parallel()
    run: Run
    train: Train
    deepspeed: str | None = None
"""
PROGRAM = "def main() -> None:\n    pass\n"
SHORT, LONG = "x = 1\n" * 450, "x = 1\n" * 451


def house(**texts: str) -> dict[str, str]:
    """Texts by path. In the names, `__` stands for a slash and `.py` is left out."""
    return {f"{name.replace('__', '/')}.py": text for name, text in texts.items()}


def below(text: str) -> dict[str, str]:
    """A file of megatron_ext beside the configuration."""
    return {"megatron_ext/layers.py": text, "pangu/config/schema.py": SCHEMA}


def package(text: str) -> dict[str, str]:
    """The package's own file, and something that it may offer."""
    return {"pangu/__init__.py": text, "pangu/model/model.py": ""}


BREACHES: list[tuple[Rule, dict[str, str], str]] = [
    (architecture.circles, house(pangu__data__a="from pangu.data import b", pangu__data__b="import pangu.data.a"), "pangu/data/a.py > "),
    (
        architecture.circles,
        house(
            pangu__data__a="def f():\n    from pangu.data.b import x",
            pangu__data__b="if TYPE_CHECKING:\n    from pangu.data.c import x",
            pangu__data__c="from .a import x",
        ),
        "pangu/data/",
    ),
    (
        architecture.circles,
        {"pangu/data/__init__.py": "from pangu.data.a import x", "pangu/data/a.py": "from pangu.data import x"},
        "pangu/data/__init__.py",
    ),
    (
        architecture.circles,
        house(tests__helpers__a="from helpers.b import x", tests__helpers__b="from helpers.a import x"),
        "tests/helpers",
    ),
    (architecture.upward_imports, house(pangu__data__a="from pangu.model.block import B", pangu__model__block=""), "pangu/model/block.py"),
    (architecture.upward_imports, house(pangu__data__a="def f():\n    from pangu import train", pangu__train=""), "pangu/train.py"),
    (
        architecture.upward_imports,
        {"pangu/data/a.py": "if TYPE_CHECKING:\n    from pangu.model import B", "pangu/model/__init__.py": ""},
        "pangu/model/__init__.py",
    ),
    (architecture.upward_imports, house(pangu__data__a="import_module('pangu.train')", pangu__train=""), "pangu/train.py"),
    (architecture.upward_imports, {"pangu/data/a.py": "from pangu import load", "pangu/__init__.py": ""}, "pangu/__init__.py"),
    (architecture.upward_imports, house(pangu__files="from pangu.text.a import x", pangu__text__a=""), "pangu/text/a.py"),
    (architecture.upward_imports, house(megatron_ext__a="from pangu.errors import E", pangu__errors=""), "pangu/errors.py"),
    (
        architecture.upward_imports,
        house(megatron_ext__a="from megatron_ext.supervision.b import x", megatron_ext__supervision__b=""),
        "megatron_ext/supervision/b.py",
    ),
    (architecture.upward_imports, house(pangu__engine__a="from pangu.planner import b", pangu__planner__b=""), "same floor"),
    (architecture.upward_imports, house(pangu__train="from pangu.plan import main", pangu__plan=PROGRAM), "another program"),
    (architecture.upward_imports, house(tools__train="import pangu.train\n" + "x = 1\n" * 15, pangu__train=PROGRAM), "another program"),
    (architecture.upward_imports, house(tools__a="from b import x", tools__b=""), "another program"),
    (architecture.upward_imports, house(pangu__novel__a="x = 1"), "stands on no floor"),
    (architecture.upward_imports, house(pangu__data__a="from tests.helpers import b", tests__helpers__b=""), "outside the house"),
    (architecture.eager_package, package("from pangu.model.model import PanguModel"), "pangu.model.model"),
    (architecture.eager_package, package("try:\n    import torch\nexcept ImportError:\n    torch = None"), "torch"),
    (architecture.deepspeed_internals, house(pangu__training__a="def f():\n    import deepspeed"), "deepspeed"),
    (architecture.deepspeed_internals, house(pangu__training__a="from deepspeed.pipe import LayerSpec"), "deepspeed.pipe.LayerSpec"),
    (architecture.deepspeed_internals, house(tools__a="from deepspeed import comm"), "deepspeed.comm"),
    (architecture.deepspeed_internals, house(pangu__benchmarks__other="import deepspeed"), "deepspeed"),
    (architecture.deepspeed_internals, house(pangu__benchmarks__startup="x = 1"), "ALLOWED"),
    (architecture.deepspeed_internals, house(pangu__training__a="self.engine.engine.step()"), "self.engine.engine "),
    (architecture.deepspeed_internals, house(pangu__training__a="engine.engine.global_steps = 1"), "engine.engine "),
    (architecture.deepspeed_internals, house(pangu__training__a="x = run.optimizer.optimizer"), "run.optimizer.optimizer "),
    (architecture.deepspeed_internals, house(megatron_ext__accelerator="x = run.optimizer.optimizer"), "run.optimizer.optimizer "),
    (architecture.deepspeed_internals, house(pangu__training__a="x = ['deepspeed.runtime.engine']"), "names deepspeed.runtime.engine"),
    (architecture.long_files, house(tests__test_a=LONG), "451 lines"),
    (architecture.long_files, {"pangu/conversion/remote_code/a.py": LONG}, "451 lines"),
    (architecture.model_names_below, below("from pangu.errors import E"), "names pangu"),
    (architecture.model_names_below, below('"""Layers of PanGu."""'), "names pangu"),
    (architecture.model_names_below, below("class PanguLayer:\n    pass"), "names pangu"),
    (architecture.model_names_below, below("raise E(f'parallel.tensor = {size} does not divide')"), "parallel.tensor"),
    (architecture.model_names_below, below("raise E('Raise run.hang_timeout.')"), "run.hang_timeout"),
    (architecture.model_names_below, below("raise E('it must divide model.num_heads')"), "model.num_heads"),
    (architecture.model_names_below, below("raise E('start with train.unheard_of=3')"), "train.unheard_of"),
    (architecture.model_names_below, below("def f():\n    'Also in a docstring: `train.steps`.'"), "train.steps"),
    (architecture.model_names_below, house(megatron_ext__a=""), "Config"),
    (architecture.strangers_at_the_top, house(pangu__layout="def layout() -> None:\n    pass"), "no main"),
]

LAWFUL: list[tuple[Rule, dict[str, str]]] = [
    (
        architecture.circles,
        house(pangu__data__a="from pangu.data import b, c", pangu__data__b="from pangu.data import c", pangu__data__c=""),
    ),
    (
        architecture.circles,
        {"pangu/data/__init__.py": "from pangu.data import a", "pangu/data/a.py": "import pangu.data.b", "pangu/data/b.py": ""},
    ),
    (architecture.upward_imports, house(pangu__model__block="from pangu.data.a import x\nfrom pangu.model import b", pangu__data__a="")),
    (architecture.upward_imports, house(pangu__model__block="from pangu.model import b", pangu__model__b="import torch")),
    (
        architecture.upward_imports,
        house(pangu__files="from pangu.errors import E", pangu__errors="from megatron_ext import a", megatron_ext__a=""),
    ),
    (architecture.upward_imports, {"pangu/__main__.py": "from pangu import train", "pangu/train.py": PROGRAM}),
    (architecture.upward_imports, house(tools__train="from pangu.train import main\n\nmain()\n", pangu__train=PROGRAM)),
    (architecture.upward_imports, house(tests__test_a="from pangu.train import main", pangu__train=PROGRAM)),
    (architecture.upward_imports, {"pangu/conversion/remote_code/a.py": "from pangu.train import main", "pangu/train.py": PROGRAM}),
    (architecture.upward_imports, package("def load():\n    from pangu.model.model import PanguModel")),
    (architecture.eager_package, package("def load():\n    from pangu.model.model import PanguModel")),
    (architecture.eager_package, package("import sys\nif TYPE_CHECKING:\n    from pangu.model.model import PanguModel")),
    (architecture.deepspeed_internals, house(pangu__engine__a="import deepspeed\nself.engine.engine.step()")),
    (architecture.deepspeed_internals, house(megatron_ext__accelerator="import deepspeed")),
    (architecture.deepspeed_internals, house(megatron_ext__a="from deepspeed.accelerator import get_accelerator")),
    (architecture.deepspeed_internals, house(pangu__benchmarks__startup="import deepspeed")),
    (architecture.deepspeed_internals, house(tests__test_a="from deepspeed.pipe import LayerSpec\nengine.engine.step()")),
    (
        architecture.deepspeed_internals,
        house(pangu__training__a="from pangu.engine.engine import E\nfrom pangu.conversion import deepspeed"),
    ),
    (architecture.deepspeed_internals, house(pangu__training__a="import pangu.engine.engine\nx = pangu.engine.engine.TrainingEngine")),
    (architecture.long_files, house(tests__test_a=SHORT)),
    (
        architecture.model_names_below,
        below("def f():\n    'torch.optim.Adam, `model.parameters()`, torch.utils.data.Dataset, data.py; run.'\n"),
    ),
    (architecture.model_names_below, below("x = train.steps  # train.steps is an attribute here")),
    (architecture.model_names_below, {**below(""), "pangu/model/block.py": "raise E('parallel.tensor = 3')"}),
    (architecture.strangers_at_the_top, house(pangu__train=PROGRAM, pangu__errors="", pangu__files="", pangu__model__block="")),
    (architecture.strangers_at_the_top, {"pangu/__init__.py": "", "pangu/__main__.py": "VERBS = {}"}),
]


@pytest.fixture(autouse=True)
def one_allowed_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "ALLOWED", {"pangu/benchmarks/startup.py": "for this test"})


@pytest.mark.parametrize(("rule", "texts", "named"), BREACHES)
def test_a_rule_finds_a_breach(rule: Rule, texts: dict[str, str], named: str) -> None:
    found = rule(architecture.parse(texts))
    assert len(found) == 1, found
    assert named in found[0].message or named in found[0].path, found


@pytest.mark.parametrize(("rule", "texts"), LAWFUL)
def test_a_rule_leaves_the_lawful_alone(rule: Rule, texts: dict[str, str]) -> None:
    assert rule(architecture.parse(texts)) == []


def test_every_rule_is_checked_and_shown_both() -> None:
    assert {rule for rule, *_ in BREACHES} == {rule for rule, _ in LAWFUL} == set(architecture.RULES)


def test_a_finding_names_the_line() -> None:
    sources = architecture.parse(house(pangu__data__a="import os\n\n\ndef f():\n    import pangu.train\n", pangu__train=PROGRAM))
    assert [(finding.path, finding.line) for finding in architecture.upward_imports(sources)] == [("pangu/data/a.py", 5)]


def test_two_circles_are_two_findings() -> None:
    texts = house(
        **{f"pangu__{room}__{here}": f"import pangu.{room}.{there}" for room in ("data", "text") for here, there in ("ab", "ba")},
    )
    assert len(architecture.circles(architecture.parse(texts))) == 2


def test_the_real_tree_passes() -> None:
    result = subprocess.run([sys.executable, "tools/architecture.py", "check"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_exits_with_1_on_a_breach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["architecture.py", "check"])
    monkeypatch.setattr(architecture, "read_tree", lambda root: architecture.parse({**below(""), "pangu/layout.py": ""}))
    assert architecture.main() == 1
    assert re.fullmatch(r"pangu/layout\.py:1: is not a program.*\n", capsys.readouterr().out)


def test_the_drawing_of_the_real_tree_is_current(tmp_path: Path) -> None:
    drawing = tmp_path / "architecture.svg"
    subprocess.run([sys.executable, "tools/architecture.py", "draw", str(drawing)], cwd=ROOT, timeout=120, check=True)
    current = drawing.read_bytes() == (ROOT / "docs/architecture.svg").read_bytes()
    assert current, "run python tools/architecture.py draw docs/architecture.svg"


def test_the_drawing_shows_rooms_files_and_only_arrows_that_say_something() -> None:
    texts = {
        "pangu/train.py": "from pangu.model.block import B\nfrom pangu.data.indexed import I\n" + PROGRAM,
        "pangu/model/block.py": "from pangu.data.indexed import I",
        "pangu/data/indexed.py": "def f():\n    from pangu.model.block import B",  # upwards: a breach, and no arrow
        "pangu/text/tokenizer.py": "",
    }
    sources = architecture.parse(texts)
    assert architecture.room_arrows(sources) == [("pangu/model", "pangu/data"), ("programs", "pangu/model")]
    drawing = architecture.draw(sources)
    words = "".join(ElementTree.fromstring(drawing).itertext())
    assert all(word in words for word in ("programs", "train", "pangu/model", "block", "pangu/data", "indexed", "pangu/text", "tokenizer"))
    assert drawing.count("marker-end") == 2
    assert drawing == architecture.draw(architecture.parse(dict(reversed(texts.items()))))


def test_arrows_to_far_floors_pass_beside_the_boxes() -> None:
    texts = house(pangu__train="from pangu.text import a\nfrom pangu.data import a", pangu__data__a="", pangu__text__a="")
    boxes = architecture.lay_out(architecture.parse(texts))
    between = boxes["pangu/data"]
    lines = re.findall(r'<path d="(M[^"]*)" fill="none"', architecture.draw(architecture.parse(texts)))
    passing = [line for line in lines if f" V{between.y + between.height - 1:.0f}" in line]
    assert len(lines) == 2 and len(passing) == 1
    x = float(re.findall(r"([\d.]+) [\d.]+ V", passing[0])[-1])
    assert not between.x <= x <= between.x + between.width
