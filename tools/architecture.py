"""Check that imports keep to the floors of the house.

    python tools/architecture.py        # one line per breach, exit code 1 if there is one

An import goes down or stays in its room; a room is a folder, or files that belong together. Every rule below is a function from parsed
sources to breaches. Imports count wherever they are written: at the top, inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron_ext", "pangu", "tools", "tests", "integrations")

FLOORS = (
    ("programs", "tools"),
    ("pangu/__init__",),
    ("pangu/benchmarks", "pangu/quickstart"),
    ("pangu/serving", "pangu/evaluation", "pangu/calibration"),
    ("pangu/inference", "pangu/training"),
    ("pangu/conversion",),
    ("pangu/engine", "pangu/planner"),
    ("pangu/model", "pangu/corpus"),
    ("pangu/data",),
    ("pangu/tensor_files", "pangu/text", "pangu/config"),
    ("pangu/files, errors",),
    ("megatron_ext/supervision",),
    ("megatron_ext",),
)
"""Rooms by floor, the highest floor first. Rooms that are no folder: the files in SINGLE; programs are the other files of pangu/ itself."""
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
SINGLE = {"pangu/__init__.py": "pangu/__init__", "pangu/files.py": "pangu/files, errors", "pangu/errors.py": "pangu/files, errors"}
TRAVELS = "pangu/conversion/remote_code/"
"""Code that is copied beside exported weights and that transformers imports: it stands outside the house."""
VERBS = "pangu/__main__.py"
"""The table of verbs, the one program that imports the others."""
SCHEMA = "pangu/config/schema.py"
ALLOWED = {"pangu/benchmarks/startup.py": "it times deepspeed.initialize from outside, so that the engine needs no clock of its own"}
"""Benchmarks that may import DeepSpeed, each with its reason."""
MAX_LINES = 450
LONGER = {
    "pangu/conversion/remote_code/modeling_pangu.py": 470,
    "tests/pangu/conversion/test_fuzz.py": 548,
    "tests/pangu/conversion/test_megatron.py": 543,
    "tests/pangu/conversion/test_mindspore.py": 490,
    "tests/pangu/conversion/test_transformers.py": 580,
}
"""Files that were longer when the rule came: they may shrink, not grow, and a file that fits again leaves the table."""
DOOR_LINES = 15
"""Longest file of tools/ that may import a program: it only lends the program another name."""


@dataclass(frozen=True)
class Source:
    """A Python file: its text and what the parser makes of it."""

    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.text.count("\n")


class Finding(NamedTuple):
    """A breach of a rule: path from the root, line (counted from 1), and what to do about it."""

    path: str
    line: int
    message: str


Sources = dict[str, Source]


def parse(texts: dict[str, str]) -> Sources:
    """Sources by path from the root, from texts by path."""
    return {path: Source(text, ast.parse(text, path)) for path, text in sorted(texts.items())}


def read_tree(root: Path) -> Sources:
    """All Python files of the project; those of virtual environments, builds and runs are not its own."""
    paths = [path.relative_to(root) for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS)) for path in root.glob(pattern)]
    foreign = {"build", "runs", "site-packages"}
    ours = [path for path in paths if not any(part in foreign or part.startswith(".") for part in path.parts)]
    return parse({path.as_posix(): (root / path).read_text(encoding="utf-8") for path in ours})


def room_of(path: str) -> str | None:
    """Room that a file belongs to; None outside the house."""
    folder = PurePosixPath(path).parent
    if path in SINGLE or path.startswith(TRAVELS):
        return SINGLE.get(path)
    if str(folder) == "pangu":
        return "programs"
    return next((room for room in map(str, [folder, *folder.parents]) if room in LEVEL), None)


def imported_names(path: str, tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of everything that a tree imports; the name is empty in `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = PurePosixPath(path).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(word.value), "") for word in node.args[:1] if isinstance(word, ast.Constant))


def edges(sources: Sources) -> list[tuple[str, int, str]]:
    """Who imports whom: path, line, path imported. Files of tools/ and tests/ also import by names that start in these folders."""
    found = set()
    for path, source in sources.items():
        first = path.split("/")[0]
        bases = ("", f"{first}/") if first in ("tools", "tests") else ("",)
        for line, module, name in imported_names(path, source.tree):
            dotted = [f"{module}.{name}", module] if name else [module]
            candidates = [base + each.replace(".", "/") + end for each in dotted for base in bases for end in (".py", "/__init__.py")]
            target = next((each for each in candidates if each in sources), None)
            if target and not path.startswith(TRAVELS) and not target.startswith(TRAVELS):
                found.add((path, line, target))
    return sorted(found)


def circles(sources: Sources) -> list[Finding]:
    """Files that import each other in a circle. Circles that share an import with a reported one wait for its repair."""
    lines = {(path, target): line for path, line, target in reversed(edges(sources))}
    graph = {path: [target for each, target in sorted(lines) if each == path] for path in sources}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            loop = error.args[1][::-1][:-1]  # each imports the next, and the last imports the first
            start = loop.index(min(loop))
            loop = [*loop[start:], *loop[: start + 1]]
            for path, target in pairwise(loop):
                graph[path].remove(target)
            message = f"imports run in a circle: {' > '.join(loop)}. Move what they share down into a file of its own"
            found.append(Finding(loop[0], lines[loop[0], loop[1]], message))
        else:
            return found


def upward_imports(sources: Sources) -> list[Finding]:
    """Imports from a lower floor to a higher one, between rooms of one floor or between programs; and folders without a floor."""
    message = "stands on no floor: give its folder a place in FLOORS of tools/architecture.py"
    house = [path for path in sources if path.startswith(("pangu/", "megatron_ext/", "tools/")) and not path.startswith(TRAVELS)]
    found = [Finding(path, 1, message) for path in house if room_of(path) is None]
    for path, line, target in edges(sources):
        here, there = room_of(path), room_of(target)
        if here is None or path == target:
            continue
        if there is None:
            found.append(Finding(path, line, f"imports {target}, which stands outside the house"))
        elif LEVEL[there] < LEVEL[here]:
            found.append(Finding(path, line, f"imports {target} of a higher floor ({here} is below {there}): move what they share down"))
        elif LEVEL[there] == LEVEL[here] == 0:
            door = here == "tools" and there == "programs" and sources[path].lines <= DOOR_LINES
            if path != VERBS and not door:
                found.append(Finding(path, line, f"imports {target}, another program: move what they share into a room below"))
        elif LEVEL[there] == LEVEL[here] and there != here:
            found.append(Finding(path, line, f"imports {target} of another room on the same floor: move what they share down"))
    return found


def eager_package(sources: Sources) -> list[Finding]:
    """Imports that run with `import pangu` itself, apart from the standard library's. What only type checkers read does not run."""
    found = []
    for node in sources["pangu/__init__.py"].tree.body if "pangu/__init__.py" in sources else []:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            continue
        for line, module, _ in imported_names("pangu/__init__.py", node):
            if module.split(".")[0] not in sys.stdlib_module_names:
                found.append(Finding("pangu/__init__.py", line, f"imports {module} with the package: import it inside a function"))
    return found


def deepspeed_internals(sources: Sources) -> list[Finding]:
    """DeepSpeed imported, or the objects inside its engine and optimizer touched, outside pangu/engine/ and the accelerator. Tests may."""
    found = []
    for path, source in sources.items():
        if path.startswith(("pangu/engine/", "tests/")):
            continue
        named = []
        for line, module, name in imported_names(path, source.tree):
            full = f"{module}.{name}".rstrip(".")
            if f"{full}.".startswith("deepspeed.") and not f"{full}.".startswith("deepspeed.accelerator."):
                named.append(Finding(path, line, f"imports {full}: only pangu/engine/ knows DeepSpeed; ask it, or move this there"))
        if path.startswith("pangu/benchmarks/") and path in ALLOWED:
            named = [] if named else [Finding(path, 1, "imports no DeepSpeed: take it out of ALLOWED in tools/architecture.py")]
        found += [] if path == "megatron_ext/accelerator.py" else named
        for node in (each for each in ast.walk(source.tree) if isinstance(each, ast.Attribute)):
            chain = ast.unparse(node)
            if f".{chain}".endswith((".engine.engine", ".optimizer.optimizer")) and not chain.startswith("pangu."):
                found.append(Finding(path, node.lineno, f"{chain} is DeepSpeed's own object: give pangu/engine/ a method for this"))
    return found


def long_files(sources: Sources) -> list[Finding]:
    """Files, tests included, that do not fit a sitting."""
    over = {path: source.lines for path, source in sources.items() if source.lines > LONGER.get(path, MAX_LINES)}
    found = [Finding(path, lines, f"{lines} lines, at most {MAX_LINES} expected: look for the seam") for path, lines in over.items()]
    fits = [path for path in LONGER if path in sources and sources[path].lines <= MAX_LINES]
    return found + [Finding(path, 1, "fits again: take it out of LONGER in tools/architecture.py") for path in fits]


def configuration_keys(schema: ast.Module) -> dict[str, list[str]]:
    """Keys of the run's configuration by section, `tensor` under `parallel`, from the classes of pangu/config/schema.py."""
    fields: dict[str, dict[str, str]] = {}
    for node in schema.body:
        if isinstance(node, ast.ClassDef):
            annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            fields[node.name] = {ast.unparse(item.target): ast.unparse(item.annotation) for item in annotated}
    return {section: list(fields[kind]) for section, kind in fields.get("Config", {}).items() if kind in fields}


def model_names_below(sources: Sources) -> list[Finding]:
    """`pangu` anywhere in megatron_ext, comments included, and the keys of PanGu's configuration in its strings."""
    sections = configuration_keys(sources[SCHEMA].tree) if SCHEMA in sources else {}
    if not sections:
        return [Finding(SCHEMA, 1, "holds no class Config with sections: the keys that megatron_ext must not name are read from it")]
    keys = "|".join(f"{section}\\.{key}" for section in sections for key in sections[section])
    pattern = re.compile(rf"(?<![\w./])(?:(?:{keys})(?![\w(]|\.\w)|(?:{'|'.join(sections)})\.[a-z_]+ ?=(?!=))")
    found = []
    for path, source in sources.items():
        if not path.startswith("megatron_ext/"):
            continue
        for number, line in enumerate(source.text.split("\n"), start=1):
            if "pangu" in line.lower():
                found.append(Finding(path, number, "names pangu, a package above: pass in what it needs to know of it"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for match in pattern.finditer(node.value):
                    message = f"names the configuration key {match[0].rstrip(' =')}: the caller knows the key and adds it to the message"
                    found.append(Finding(path, node.lineno, message))
    return found


def strangers_at_the_top(sources: Sources) -> list[Finding]:
    """Files at the top of pangu/ that are no program: a program has a function `main`."""
    message = "has no function main, so it is no program: move it into the folder of its subject"
    top = [path for path in sources if room_of(path) == "programs" and path != VERBS]
    mains = {path for path in top for node in sources[path].tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"}
    return [Finding(path, 1, message) for path in top if path not in mains]


RULES = (circles, upward_imports, eager_package, deepspeed_internals, long_files, model_names_below, strangers_at_the_top)


def check(sources: Sources) -> list[Finding]:
    """Breaches of all rules, by file and line."""
    return sorted({finding for rule in RULES for finding in rule(sources)})


def main() -> None:
    """Print the breaches, one line each, and exit with 1 if there is one."""
    findings = check(read_tree(ROOT))
    for finding in findings:
        print(f"{finding.path}:{finding.line}: {finding.message}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
