"""The walls of the architecture, read from the source: who imports whom, who talks to other ranks or names a device, what is never loaded.

Every wall is a function from a file's syntax tree to what it finds there; each is also shown a line that it must find.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REMOTE_CODE = ROOT / "pangu/conversion/remote_code"
LATE = {"deepspeed", "torch_npu", "apex", "transformers"}
"""Imported where they are used: they are slow, optional, or choose a device when they are imported."""


def sources(*packages: str) -> dict[str, ast.Module]:
    """Syntax trees by path from the root. The code that travels with exported weights is transformers' to import: it is not one of us."""
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py")) if path.parent != REMOTE_CODE]
    assert files
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def top_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, nothing under TYPE_CHECKING."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def dotted(node: ast.AST) -> str:
    """`torch.cuda.is_available` of an attribute or a name; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def packages_imported(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def late_imports_at_top(tree: ast.Module) -> set[str]:
    return packages_imported(top_level(tree)) & LATE


def communication(tree: ast.Module) -> set[str]:
    """Ways to torch.distributed, DeepSpeed's wrapper of it included."""
    ways = ("torch.distributed", "deepspeed.comm", "deepspeed.init_distributed")
    used = [*imports(tree), *(dotted(node) for node in ast.walk(tree))]
    return {way for way in ways for name in used if name == way or name.startswith(f"{way}.")}


def device_names(tree: ast.Module) -> set[str]:
    """Device types and backends in strings, their torch namespaces, and torch_npu."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"(cuda|npu|nccl|hccl|gloo)(:\d*)?", node.value):
            found.add(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu", "mps", "xpu"):
            found.add(f".{node.attr}")
    return found | ({"torch_npu"} & packages_imported(tree))


def unsafe_loading(tree: ast.Module) -> set[str]:
    """Calls that run what a file holds, or may. Writing a pickle is no such call."""
    safe_loaders = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    } | {"yaml.SafeLoader"}
    used = [*imports(tree), *map(dotted, ast.walk(tree))]
    found = {name for name in used if name.startswith("pickle.") and name not in ("pickle.Pickler", "pickle.dump", "pickle.dumps")}
    found |= {"cloudpickle", "dill", "joblib", "marshal", "shelve"} & packages_imported(tree)
    found |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.alias) and node.name == "pickle" and node.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loaders = [*map(ast.unparse, node.args[1:]), *filter(None, [keywords.get("Loader")])]
        if (
            name in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all")
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name == "yaml.load" and not safe_loaders & set(loaders))
            or keywords.get("weights_only") == "False"
            or keywords.get("allow_pickle") == "True"
            or keywords.get("shell") == "True"
        ):
            found.add(ast.unparse(node))
    return found


def relative_imports(tree: ast.Module) -> set[str]:
    return {name for name in imports(tree) if name.startswith(".")}


def findings(wall: Callable[[ast.Module], set[str]], *packages: str) -> dict[str, set[str]]:
    """What a wall finds, by file."""
    return {path: found for path, tree in sources(*packages).items() if (found := wall(tree))}


def test_dependencies_run_one_way() -> None:
    for package, above in (("megatron_ext", {"pangu", "tools", "tests"}), ("pangu", {"tools", "tests"})):
        assert findings(lambda tree, above=above: packages_imported(tree) & above, package) == {}


def test_imports_are_absolute() -> None:
    assert findings(relative_imports, "megatron_ext", "pangu", "tools") == {}


def test_slow_and_optional_packages_are_imported_where_they_are_used() -> None:
    assert findings(late_imports_at_top, "megatron_ext", "pangu", "tools") == {}


def test_the_code_that_travels_with_weights_stands_alone() -> None:
    lent = {"sentencepiece", "jieba", "torch", "transformers"}
    paths = sorted(REMOTE_CODE.glob("*.py"))
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        relative = relative_imports(tree)
        assert all(name.startswith(".configuration_pangu.") for name in relative), path
        assert packages_imported(tree) - {""} - sys.stdlib_module_names <= lent, path
        assert not device_names(tree) and not unsafe_loading(tree) and not communication(tree), path


def test_few_files_talk_to_other_ranks() -> None:
    assert findings(communication, "megatron_ext", "pangu", "tools") == {
        "megatron_ext/accelerator.py": {"deepspeed.init_distributed", "torch.distributed"},
        "megatron_ext/collectives.py": {"torch.distributed"},
        "megatron_ext/supervision/rendezvous.py": {"torch.distributed"},
        "megatron_ext/topology.py": {"torch.distributed"},
    }


def test_one_file_names_devices_and_backends() -> None:
    found = findings(device_names, "megatron_ext", "pangu", "tools")
    assert found.pop("megatron_ext/accelerator.py")
    assert found == {
        # The attention kernel that only Ascend has.
        "megatron_ext/attention.py": {"torch_npu"},
        # Which fused optimizer a device has.
        "pangu/engine/optimizer.py": {"cuda", "npu", "torch_npu"},
    }


def test_no_file_is_run_by_loading_it() -> None:
    assert findings(unsafe_loading, "megatron_ext", "pangu", "tools") == {}


BREACHES: list[tuple[Callable[[ast.Module], set[str]], str]] = [
    (packages_imported, "def f():\n    from pangu.config import Config"),
    (relative_imports, "from . import config"),
    (late_imports_at_top, "class A:\n    import deepspeed.pipe"),
    (late_imports_at_top, "try:\n    from transformers import AutoModel\nexcept ImportError:\n    pass"),
    (communication, "import torch.distributed as dist"),
    (communication, "from torch import distributed"),
    (communication, "from torch.distributed import all_reduce"),
    (communication, "torch.distributed.barrier()"),
    (communication, "from deepspeed import comm"),
    (device_names, "x = torch.device('cuda:0')"),
    (device_names, "x.to(f'npu')"),
    (device_names, "torch.cuda.synchronize()"),
    (device_names, "x = x.cuda()"),
    (device_names, "def f():\n    import torch_npu"),
    (unsafe_loading, "import pickle\npickle.load(file)"),
    (unsafe_loading, "import pickle\nclass U(pickle.Unpickler): pass"),
    (unsafe_loading, "import pickle as p"),
    (unsafe_loading, "from pickle import loads"),
    (unsafe_loading, "import marshal"),
    (unsafe_loading, "eval('1')"),
    (unsafe_loading, "torch.load(path)"),
    (unsafe_loading, "torch.load(path, weights_only=False)"),
    (unsafe_loading, "np.load(path, allow_pickle=True)"),
    (unsafe_loading, "yaml.load(text, Loader)"),
    (unsafe_loading, "yaml.load(text, yaml.Loader)"),
    (unsafe_loading, "subprocess.run(text, shell=True)"),
]


@pytest.mark.parametrize(("wall", "line"), BREACHES)
def test_walls_find_a_breach(wall: Callable[[ast.Module], set[str]], line: str) -> None:
    assert wall(ast.parse(line))


@pytest.mark.parametrize(
    ("wall", "line"),
    [
        (late_imports_at_top, "def f():\n    import deepspeed"),
        (late_imports_at_top, "if TYPE_CHECKING:\n    from deepspeed.pipe import LayerSpec"),
        (device_names, "implementation = 'npu_fusion'"),
        (unsafe_loading, "class L(yaml.SafeLoader): pass\nyaml.load(text, L)"),
        (unsafe_loading, "import pickle\nclass P(pickle.Pickler): pass"),
        (unsafe_loading, "torch.load(path, weights_only=True)"),
    ],
)
def test_walls_leave_the_lawful_alone(wall: Callable[[ast.Module], set[str]], line: str) -> None:
    assert wall(ast.parse(line)) == set()


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "pangu, pangu.__main__, pangu.config, pangu.train, megatron_ext",
            LATE | {"torch"},
        ),  # so that a mistake in a recipe is told at once
        ("megatron_ext.layers, megatron_ext.attention, megatron_ext.recompute, pangu.training.run, pangu.conversion.huggingface", LATE),
    ],
)
def test_importing_is_light(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; print(*sorted({absent!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
