"""Check that imports follow the floors of docs/architecture.md, and draw the architecture from the imports.

    python tools/architecture.py check                        # one line per breach, exit code 1 if there is one
    python tools/architecture.py draw docs/architecture.svg   # after a change of files or imports; a test compares the two

An import goes down or stays in its room; a room is a folder, or files that belong together. Every rule below is a function from parsed
sources to breaches. Imports count wherever they are written: at the top, inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

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
"""Rooms by floor, the highest first. Rooms that are not folders: the files in SINGLE; programs are the other files of pangu/ itself."""
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
SINGLE = {"pangu/__init__.py": "pangu/__init__", "pangu/files.py": "pangu/files, errors", "pangu/errors.py": "pangu/files, errors"}
TRAVELS = "pangu/conversion/remote_code/"  # copied beside exported weights for transformers to import: outside the house
VERBS = "pangu/__main__.py"  # the table of verbs, the one program that imports the others
SCHEMA = "pangu/config/schema.py"
ALLOWED = {"pangu/benchmarks/startup.py": "it times deepspeed.initialize from outside, so that the engine needs no clock of its own"}
"""Benchmarks that may import DeepSpeed, each with its reason."""
INTERNAL = re.compile(r"deepspeed\.(?:runtime|pipe|ops|utils|zero|checkpoint)(?:\.\w+)*")
"""Matches the name of a module inside DeepSpeed in a string."""
MAX_LINES = 450
DOOR_LINES = 15  # of the longest file of tools/ that may import a program: it only lends the program another name
Sources: TypeAlias = "dict[str, Source]"


class Source(NamedTuple):
    """A Python file: its text, the number of its lines, and what the parser makes of it."""

    text: str
    lines: int
    tree: ast.Module


class Finding(NamedTuple):
    """A breach of a rule: path from the root, line (counted from 1), and what to do about it."""

    path: str
    line: int
    message: str


def parse(texts: dict[str, str]) -> Sources:
    """Sources by path from the root, from texts by path."""
    return {path: Source(text, text.count("\n"), ast.parse(text, path)) for path, text in sorted(texts.items())}


def read_tree(root: Path) -> Sources:
    """All Python files of the project; those of virtual environments, builds and runs are not its own."""
    paths = [path.relative_to(root) for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS)) for path in root.glob(pattern)]
    ours = [path for path in paths if not any(part in ("build", "runs", "site-packages") or part[0] == "." for part in path.parts)]
    return parse({path.as_posix(): (root / path).read_text(encoding="utf-8") for path in ours})


def room_of(path: str) -> str | None:
    """Room that a file belongs to; None outside the house."""
    folder = PurePosixPath(path).parent
    if path in SINGLE or path.startswith(TRAVELS):
        return SINGLE.get(path)
    rooms = ["programs"] if str(folder) == "pangu" else map(str, [folder, *folder.parents])
    return next((room for room in rooms if room in LEVEL), None)


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
            loop = error.args[1][::-1]  # each imports the next; the first is also the last
            for path, target in pairwise(loop):
                graph[path].remove(target)
            message = f"imports run in a circle: {' > '.join(loop)}. Move what they share down into a file of its own"
            found.append(Finding(loop[0], lines[loop[0], loop[1]], message))
        else:
            return found


def upward_imports(sources: Sources) -> list[Finding]:
    """Imports from a lower floor to a higher one, between rooms of one floor or between programs; and folders without a floor."""
    house = [path for path in sources if path.startswith(("pangu/", "megatron_ext/", "tools/")) and not path.startswith(TRAVELS)]
    found = [Finding(path, 1, "stands on no floor: give its folder a place in FLOORS") for path in house if room_of(path) is None]
    for path, line, target in edges(sources):
        here, there = room_of(path), room_of(target)
        if here is None:
            continue
        if there is None:
            found.append(Finding(path, line, f"imports {target}, which stands outside the house"))
        elif LEVEL[there] < LEVEL[here]:
            found.append(Finding(path, line, f"imports {target} of a higher floor, {there} above {here}: move what they share down"))
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
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
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
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and INTERNAL.fullmatch(node.value):
                found.append(Finding(path, node.lineno, f"names {node.value}: only pangu/engine/ knows DeepSpeed's modules"))
            if isinstance(node, ast.Attribute) and re.search(r"(?<!^pangu\.)\b(engine|optimizer)\.\1$", chain := ast.unparse(node)):
                found.append(Finding(path, node.lineno, f"{chain} is DeepSpeed's own object: give pangu/engine/ a method for this"))
    return found


def long_files(sources: Sources) -> list[Finding]:
    """Files, tests included, that do not fit a sitting."""
    over = {path: source.lines for path, source in sources.items() if source.lines > MAX_LINES}
    return [Finding(path, lines, f"{lines} lines, at most {MAX_LINES} expected: look for the seam") for path, lines in over.items()]


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
    for path, source in ((path, source) for path, source in sources.items() if path.startswith("megatron_ext/")):
        for number, line in enumerate(source.text.split("\n"), start=1):
            if "pangu" in line.lower():
                found.append(Finding(path, number, "names pangu, a package above: pass in what it needs to know of it"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for match in pattern.finditer(node.value):
                    found.append(
                        Finding(path, node.lineno, f"names the configuration key {match[0].rstrip(' =')}: leave that to the caller")
                    )
    return found


def strangers_at_the_top(sources: Sources) -> list[Finding]:
    """Files at the top of pangu/ that are not programs: a program has a function `main`."""
    top = [path for path in sources if room_of(path) == "programs" and path != VERBS]
    mains = {path for path in top for node in sources[path].tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"}
    return [Finding(path, 1, "is not a program, it has no main: move it to the folder of its subject") for path in top if path not in mains]


def check(sources: Sources) -> list[Finding]:
    """Breaches of all rules, by file and line."""
    return sorted({finding for rule in RULES for finding in rule(sources)})


RULES = (circles, upward_imports, eager_package, deepspeed_internals, long_files, model_names_below, strangers_at_the_top)
WIDTH, GAP, FLIGHT = 1200, 44, 48
"""Pixels: the drawing's width, from one box to the next, and from one floor to the next."""
COLOURS = {"pangu": ("#e9f0fb", "#4a78b5"), "megatron_ext": ("#e6f4ea", "#3c8a55"), "programs": ("#fff2dd", "#d98a1f")}
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"
 font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" text-anchor="middle" fill="#1f2937">
<title>Who imports whom</title>
<marker id="tip" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#5b6472"/></marker>
<rect width="100%" height="100%" fill="#fff"/>
<text x="50%" y="32" font-size="18" font-weight="bold">Who imports whom</text>
<text x="50%" y="54" font-size="12">Imports run down. An arrow that follows from others is left out. The wider a box, the more files.</text>
{shapes}
</svg>
"""


class Box(NamedTuple):
    """A room in the drawing: upper left corner and size in pixels, and the names of its files, wrapped."""

    x: float
    y: float
    width: float
    height: float
    names: list[str]


def room_arrows(sources: Sources) -> list[tuple[str, str]]:
    """Which room imports which lower one, without the arrows that follow from others."""
    pairs = {(room_of(path) or "", room_of(target) or "") for path, _, target in edges(sources)}
    down = {(upper, lower) for upper, lower in pairs if upper in LEVEL and lower in LEVEL and LEVEL[upper] < LEVEL[lower]}
    reach = set(down)
    for middle in LEVEL:
        reach |= {(upper, lower) for upper, here in reach if here == middle for there, lower in reach if there == middle}
    return sorted(down - {(upper, lower) for upper, middle in reach for there, lower in reach if there == middle})


def lay_out(sources: Sources) -> dict[str, Box]:
    """Boxes by room. Their width grows with the number of files."""
    boxes: dict[str, Box] = {}
    y = 78.0
    for floor in FLOORS:
        files = {room: paths for room in floor if (paths := [path for path in sources if room_of(path) == room])}
        widths = {room: 170 + 20 * len(paths) for room, paths in files.items()}
        scale = min(1.0, (WIDTH - GAP * (len(files) + 1)) / max(1, sum(widths.values())))
        x = (WIDTH - scale * sum(widths.values()) - GAP * (len(files) - 1)) / 2
        names = {room: ", ".join(sorted({PurePosixPath(path).stem for path in paths} - {"__init__"})) for room, paths in files.items()}
        rows = {room: textwrap.wrap(names[room] or "names of `import pangu`", int((widths[room] * scale - 20) / 6.7)) for room in files}
        height = 38 + 15 * max(map(len, rows.values()), default=0)
        for room in files:
            boxes[room] = Box(x, y, widths[room] * scale, height, rows[room])
            x += widths[room] * scale + GAP
        y += height + FLIGHT if files else 0
    return boxes


def draw(sources: Sources) -> str:
    """The house as SVG: a box a room, floors from top to bottom. Arrows to far floors pass between the boxes of the floors in between."""
    boxes, arrows, shapes = lay_out(sources), room_arrows(sources), []
    taken: list[tuple[float, float]] = []

    def port(room: str, others: list[str], other: str) -> float:
        order = sorted(others, key=lambda each: boxes[each].x + boxes[each].width / 2)
        return boxes[room].x + boxes[room].width * (order.index(other) + 1) / (len(order) + 1)

    def opening(x: float, end: float, floor: list[Box]) -> float:
        sides = [x, *(side for box in floor for step in (14, 22, 30) for side in (box.x - step, box.x + box.width + step))]
        free = [side for side in sides if all(not box.x - 12 < side < box.x + box.width + 12 for box in floor)]
        apart = [side for side in free if all(y != floor[0].y or abs(side - each) > 7 for each, y in taken)]
        taken.append((min(apart or free, key=lambda side: abs(side - x) + 0.3 * abs(side - end)), floor[0].y))
        return taken[-1][0]

    for upper, lower in arrows:
        x, y = port(upper, [b for a, b in arrows if a == upper], lower), boxes[upper].y + boxes[upper].height
        end, line = port(lower, [a for a, b in arrows if b == lower], upper), f"M{x:.0f} {y:.0f}"
        for level in range(LEVEL[upper] + 1, LEVEL[lower] + 1):
            floor = [boxes[room] for room in FLOORS[level] if room in boxes]
            if floor:
                there, top = end if level == LEVEL[lower] else opening(x, end, floor), floor[0].y - 1
                line += f" V{y:.0f} C{x:.0f} {y + 0.6 * FLIGHT:.0f} {there:.0f} {top - 0.6 * FLIGHT:.0f} {there:.0f} {top:.0f}"
                x, y = there, top + floor[0].height
        shapes.append(f'<path d="{line}" fill="none" stroke="#5b6472" stroke-width="1.4" marker-end="url(#tip)"/>')
    for room, box in boxes.items():
        fill, edge = COLOURS.get(room.split("/")[0], COLOURS["programs"])
        middle, size = f"{box.x + box.width / 2:.0f}", f'width="{box.width:.0f}" height="{box.height:.0f}"'
        shapes.append(f'<rect x="{box.x:.0f}" y="{box.y:.0f}" {size} rx="7" fill="{fill}" stroke="{edge}" stroke-width="1.3"/>')
        shapes.append(f'<text x="{middle}" y="{box.y + 21:.0f}" font-size="14" font-weight="bold">{room}</text>')
        rows = [f'<tspan x="{middle}" y="{box.y + 40 + 15 * row:.0f}">{names}</tspan>' for row, names in enumerate(box.names)]
        shapes.append(f'<text font-size="11" fill="#4b5563">{"".join(rows)}</text>')
    return SVG.format(width=WIDTH, height=round(max(box.y + box.height for box in boxes.values()) + 24), shapes="\n".join(shapes))


def main() -> int:
    """Check, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="print the violations, one per line")
    commands.add_parser("draw", help="write the drawing").add_argument("output", type=Path)
    arguments = parser.parse_args()
    sources = read_tree(ROOT)
    if arguments.command == "draw":
        arguments.output.write_text(draw(sources), encoding="utf-8")
        return 0
    found = check(sources)
    sys.stdout.writelines(f"{path}:{line}: {message}\n" for path, line, message in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
