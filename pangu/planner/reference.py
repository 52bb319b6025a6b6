"""Published training runs, one per row of a CSV file: what they trained, on what, in which layout, and how long a step took.

Columns (more may be there): id, family, source, layers, hidden, heads, ffn, vocab, seq, global_batch, micro_batch, tp, pp, interleave, dp,
zero, recompute, seqpar, precision, hardware, n_devices, iter_s, mem_gb. A cell is empty if the publication does not state it.

`reference_runs.csv` beside this file has 88 of them; its columns certainty, source and note name where each is from.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.topology import Topology
from pangu.config import ModelConfig
from pangu.errors import InputError, one_line
from pangu.files import read_text
from pangu.planner.hardware import Cluster, load_cluster
from pangu.planner.plan import Plan, Recompute, Workload

REFERENCE_RUNS = Path(__file__).with_name("reference_runs.csv")
"""The table that comes with the project."""
COLUMNS = (
    *("id", "family", "source", "layers", "hidden", "heads", "ffn", "vocab", "seq", "global_batch", "micro_batch", "tp", "pp"),
    *("interleave", "dp", "zero", "recompute", "seqpar", "precision", "hardware", "n_devices", "iter_s", "mem_gb"),
)
CLUSTERS = {
    "A100-80": "a100_80",
    "A100-40": "a100_40",
    "A100": "a100_80",
    "H100": "h100",
    "H200": "h200",
    "V100": "v100_64",
    "Ascend910": "ascend910_2048",
    "Ascend910B": "ascend910b",
}
"""Cluster file in ds_configs/clusters by prefix of the column `hardware`; the longest matching prefix is used."""
STACKS = {"Megatron-DeepSpeed": ("BLOOM", "MT-NLG", "GLM", "DeepSpeed"), "Megatron-LM": ("Megatron", "Korthikanti")}
"""Software stack by words in the name of a family."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default number of elements of the buffer in which it reduces gradients; no row states another."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Micro-batch sizes that are tried if a row does not state one."""
MAX_BYTES = 64 << 20
MAX_LAYERS = 10_000


class UnclearRow(ValueError):
    """A row lacks information or is impossible; the message says why."""


@dataclass(frozen=True)
class Run:
    """One published run."""

    id: str
    family: str
    date: str
    """Month and day in parentheses at the end of the source, where machine and software changed from day to day; else empty."""
    workload: Workload
    plans: tuple[Plan, ...]
    """One for each micro-batch size that the row leaves possible."""
    cluster: Cluster
    seconds: float | None
    """Measured seconds per optimizer step."""
    out_of_memory: bool
    batch_is_known: bool = True
    """Whether the global batch size is known; otherwise memory can be predicted, but not time."""
    notes: tuple[str, ...] = ()
    """Assumptions that were made about the row."""

    @property
    def fp32_gradients(self) -> bool:
        """Whether gradients are accumulated in fp32, as Megatron and its DeepSpeed branch do in bf16."""
        return self.workload.precision == "bf16" and self.groups[0] in STACKS

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of runs with a common speed, from the widest: the software stack, the family, and the family on that day if it has a
        date."""
        stack = next((stack for stack, words in STACKS.items() if any(word in self.family for word in words)), "other software")
        return stack, self.family, *([f"{self.family} {self.date}"] if self.date else [])


@dataclass(frozen=True)
class Row:
    """A row that was read: the run, or the reason why it cannot be used."""

    id: str
    run: Run | None
    reason: str = ""


def read_runs(path: Path | str, clusters: Path) -> list[Row]:
    """All rows of a CSV file, in its order.

    Args:
        path: the CSV file.
        clusters: directory of the cluster files.

    Raises:
        InputError: if the file cannot be read, is not a CSV table with these columns, or a line has too few or too many cells.
    """
    path = Path(path)
    try:
        text = read_text(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text.") from None
    known: dict[str, Cluster] = {}

    def cluster(name: str) -> Cluster:
        if name not in known:
            known[name] = load_cluster(clusters / f"{name}.yaml")
        return known[name]

    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if missing := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
            raise InputError(f"{path}: line 1: no column {', '.join(missing)}; found {text[:80]!r}.")
        rows = []
        for cells in reader:
            if None in cells or None in cells.values():
                found = sum(value is not None for key, value in cells.items() if key) + len(cells.get(None) or [])
                raise InputError(f"{path}: line {reader.line_num}: {found} cells, but the first line names {len(reader.fieldnames or [])}.")
            try:
                rows.append(Row(cells["id"], _run(cells, cluster)))
            except ValueError as error:
                rows.append(Row(cells["id"], None, one_line(str(error))))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: is not CSV ({error}).") from None
    return rows


def spread_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage: equal if possible; otherwise embedding and logits count as a layer each, as in BLOOM."""
    if layers % stages == 0:
        return (layers // stages,) * stages
    share, more = divmod(layers + 2, stages)
    counts = [share] * stages
    for stage in range(more):
        counts[(stage + 1) % stages] += 1  # the first stage last
    counts[0] -= 1
    counts[-1] -= 1
    return tuple(counts)


def _run(cells: dict[str, str], cluster_of: Callable[[str], Cluster]) -> Run:
    notes: list[str] = []
    hidden, heads, layers = _count(cells, "hidden"), _count(cells, "heads"), _count(cells, "layers")
    sequence = _count(cells, "seq")
    if hidden % heads:
        raise UnclearRow(f"heads = {heads} does not divide hidden = {hidden}")
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        ffn_hidden_size=_count(cells, "ffn", 4 * hidden),
        vocab_size=max(_count(cells, "vocab"), 10),
        max_positions=sequence,
        attention="eager",  # none of these runs had a fused kernel, so far as they say
    )
    known = [hardware for hardware in CLUSTERS if cells["hardware"].strip().startswith(hardware)]
    if not known:
        raise UnclearRow(f"hardware = {cells['hardware']!r} is not known: {', '.join(CLUSTERS)}")
    name = CLUSTERS[max(known, key=len)]
    if name == "a100_80" and cells["family"].startswith("BLOOM"):
        name = "a100_80_omnipath"
    layout = _layout(cells, notes)
    cluster = cluster_of(name)
    server = max((level.devices for level in cluster.levels[:-1] if level.devices < layout.world_size), default=1)
    cluster = cluster.with_devices(-(-layout.world_size // server) * server)  # whole servers, the last one partly idle
    if layers > MAX_LAYERS:
        raise UnclearRow(f"layers = {layers}, but at most {MAX_LAYERS} are accepted")
    if layout.pipeline > layers:
        raise UnclearRow(f"pp = {layout.pipeline} is more than layers = {layers}")

    given = _count(cells, "global_batch", 0)
    if micro_batch := _count(cells, "micro_batch", 0):
        micro_batches: tuple[int, ...] = (micro_batch,)
    else:
        micro_batches = tuple(size for size in MICRO_BATCHES if given % (layout.data * size) == 0) or MICRO_BATCHES[:1]
        notes.append("micro_batch is not given, the fastest that fits is assumed")
    # In memory a pipeline counts once it is full.
    batch = given or layout.world_size * max(micro_batches)
    if not given:
        notes.append("global_batch is empty: memory can be told, but no time")
    if more := batch % (layout.data * micro_batches[0]):
        batch += layout.data * micro_batches[0] - more
        notes.append(f"global_batch is not a multiple of dp x micro_batch, {batch} is assumed")
    plan = Plan(
        layout=layout,
        micro_batch_size=1,
        stage_layers=spread_layers(layers, layout.pipeline),
        zero_stage=_zero_stage(cells["zero"]),
        sequence_parallel=cells["seqpar"].strip().lower() in ("1", "true", "yes"),
        recompute=_recompute(cells["recompute"]),
        interleave=_count(cells, "interleave", 1),
        bucket_elements=BUCKET_ELEMENTS,
    )
    found = re.search(r"\((\d\d-\d\d)\)\s*$", cells["source"])
    return Run(
        id=cells["id"],
        family=cells["family"].strip(),
        date=found[1] if found else "",
        workload=Workload(model, sequence, batch, _precision(cells["precision"], cluster)),
        plans=tuple(replace(plan, micro_batch_size=size) for size in micro_batches),
        cluster=cluster,
        seconds=_seconds(cells["iter_s"]) if given else None,
        out_of_memory=any(_is_oom(cells[column]) for column in ("mem_gb", "iter_s")),
        batch_is_known=given > 0,
        notes=tuple(notes),
    )


def _count(cells: dict[str, str], column: str, default: int | None = None) -> int:
    text = cells[column].strip()
    if not text:
        if default is None:
            raise UnclearRow(f"{column} is empty")
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise UnclearRow(f"{column} = {text!r} is not a count")
    return int(text)


def _is_oom(text: str) -> bool:
    return text.strip().lower().startswith(("oom", "out of memory"))


def _seconds(text: str) -> float | None:
    if not text.strip() or _is_oom(text):
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise UnclearRow(f"iter_s = {text!r} is not a number") from None
    if not 0.0 < seconds < 1e9:
        raise UnclearRow(f"iter_s = {text!r} is not a step time")
    return seconds


def _layout(cells: dict[str, str], notes: list[str]) -> Topology:
    """The sizes of the three axes; one that is missing follows from the number of devices."""
    sizes = {column: _count(cells, column, 0) for column in ("tp", "pp", "dp")}
    devices = _count(cells, "n_devices", math.prod(sizes.values()))
    unknown = [column for column, size in sizes.items() if not size]
    if len(unknown) > 1 or not devices:
        raise UnclearRow(f"{', '.join(unknown)} empty: the layout cannot be told")
    if not unknown and math.prod(sizes.values()) != devices:
        unknown = ["dp"]
        notes.append(f"tp x pp x dp is not n_devices = {devices}, another dp is assumed")
    if unknown:
        rest = math.prod(size for column, size in sizes.items() if column not in unknown)
        if devices % rest and sizes["dp"]:
            notes[-1:] = [f"n_devices = {devices} is not plausible: tp x pp x dp is {math.prod(sizes.values())}"]
            devices = math.prod(sizes.values())
        elif devices % rest:
            raise UnclearRow(f"n_devices = {devices} is not a multiple of the product of the axes, {rest}")
        sizes[unknown[0]] = devices // rest
    return Topology(tensor=sizes["tp"], pipeline=sizes["pp"], data=sizes["dp"])


def _zero_stage(text: str) -> int:
    word = text.strip().lower()
    if word.startswith("opt-parallel"):
        return 1
    if word in ("", "auto", "none", "no", "off"):
        return 0
    found = re.fullmatch(r"(?:zero|stage)?[ _-]*([0-3])\b.*", word)
    if not found:
        raise UnclearRow(f"zero = {text!r} is not a stage from 0 to 3")
    return int(found[1])


def _recompute(text: str) -> Recompute:
    word = text.strip().lower().partition("(")[0].strip()
    if word == "full":
        return "full"
    if word == "selective":
        return "selective"
    if word in ("", "none", "no", "0"):
        return "none"
    raise UnclearRow(f"recompute = {text!r} is not none, selective or full")


def _precision(text: str, cluster: Cluster) -> str:
    short = text.lower().replace("bfloat", "bf").replace("float", "fp")
    for precision in re.findall(r"bf16|fp16|fp32", short):
        if precision in cluster.device.peak_tflops:
            return precision
    raise UnclearRow(f"precision = {text!r} is none that {cluster.device.name} has")
