"""tools/architecture.py: each rule finds a breach and leaves the lawful alone, and the project keeps all of them."""

from __future__ import annotations

from collections.abc import Callable

import architecture
import pytest

SCHEMA = {architecture.SCHEMA: "class ParallelConfig:\n    tensor: int\nclass Config:\n    parallel: ParallelConfig\n"}
LONG = "x = 1\n" * (architecture.MAX_LINES + 1)

BREACHES = [
    (architecture.circles, {"pangu/data/a.py": "import pangu.data.b", "pangu/data/b.py": "def f():\n    from pangu.data import a"}),
    (architecture.upward_imports, {"pangu/model/a.py": "from pangu.training import b", "pangu/training/b.py": ""}),
    (architecture.upward_imports, {"pangu/engine/a.py": "import pangu.planner.b", "pangu/planner/b.py": ""}),
    (architecture.upward_imports, {"megatron_ext/a.py": "import pangu.files", "pangu/files.py": ""}),
    (architecture.upward_imports, {"pangu/demo.py": "import pangu.plot", "pangu/plot.py": ""}),
    (architecture.upward_imports, {"pangu/attic/a.py": ""}),
    (architecture.eager_package, {"pangu/__init__.py": "import torch"}),
    (architecture.deepspeed_internals, {"pangu/training/a.py": "def f():\n    from deepspeed.utils import logger"}),
    (architecture.deepspeed_internals, {"pangu/training/a.py": "engine.engine.global_steps = 1"}),
    (architecture.long_files, {"tests/test_a.py": LONG}),
    (architecture.model_names_below, SCHEMA | {"megatron_ext/a.py": "# pangu"}),
    (architecture.model_names_below, SCHEMA | {"megatron_ext/a.py": "raise ValueError('change parallel.tensor')"}),
    (architecture.strangers_at_the_top, {"pangu/helper.py": "def help(): ..."}),
]
LAWFUL = [
    (architecture.circles, {"pangu/data/a.py": "import pangu.data.b", "pangu/data/b.py": "import torch"}),
    (architecture.upward_imports, {"pangu/training/a.py": "import pangu.model.b", "pangu/model/b.py": ""}),
    (architecture.upward_imports, {"tools/a.py": "from pangu.plot import main", "pangu/plot.py": ""}),
    (architecture.eager_package, {"pangu/__init__.py": "def __getattr__(name):\n    import pangu.model"}),
    (architecture.deepspeed_internals, {"pangu/engine/a.py": "import deepspeed", "megatron_ext/accelerator.py": "import deepspeed"}),
    (architecture.long_files, {"tests/test_a.py": "x = 1\n" * architecture.MAX_LINES}),
    (architecture.model_names_below, SCHEMA | {"megatron_ext/a.py": "import torch.optim  # data.mean is no key"}),
    (architecture.strangers_at_the_top, {"pangu/plot.py": "def main(): ...", "pangu/errors.py": ""}),
]
Rule = Callable[[architecture.Sources], list[architecture.Finding]]


@pytest.mark.parametrize(("rule", "texts"), BREACHES)
def test_a_breach_is_found(rule: Rule, texts: dict[str, str]) -> None:
    assert rule(architecture.parse(texts))


@pytest.mark.parametrize(("rule", "texts"), LAWFUL)
def test_the_lawful_is_left_alone(rule: Rule, texts: dict[str, str]) -> None:
    assert rule(architecture.parse(texts)) == []


def test_the_project_keeps_its_rules() -> None:
    assert architecture.check(architecture.read_tree(architecture.ROOT)) == []
