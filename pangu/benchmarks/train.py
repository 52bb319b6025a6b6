"""A training step, next to transformers' GPT-2 of equal shape.

Ours is what pangu.train runs: the model in its TrainingEngine, DeepSpeed in it, with ZeRO-0 and with ZeRO-1. The peers are in a plain loop
of PyTorch: the model without the engine, which shows what the engine costs, and GPT-2 (`sdpa`). All have random weights, the same tokens,
the same dropout and AdamW with the same settings, fused, and clip the gradient by its norm.

Each is a process of its own. On the CPU all of them wait and take a step a turn, two turns to warm up first, and each turn's speed is
divided by a peer's in the same turn; on a device they run one after the other. Numbers are medians, ranges the least and greatest. Peak
memory is of the same processes: resident on the CPU, imports included; on a device what its tensors took of it.

On the CPU much of the time of such a loop goes into memory that the allocator gives back and asks for again. pangu.train keeps what it
freed, and the model without the engine does too; GPT-2 is there with glibc's allocator as it comes and with a tuned one.

In bf16 the engine is DeepSpeed's, and the plain loops run under torch.autocast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.table import Table

from pangu.benchmarks import harness
from pangu.benchmarks.workers import Course, Way, on_cpu, same_work, take_turns
from pangu.errors import InputError

BARE, GPT2, TUNED = "the model alone", "transformers GPT-2", "transformers GPT-2, tuned malloc"
OURS = ("ZeRO-0", "ZeRO-1")
COUNTS = {
    "batch": (4, "samples a step"),
    "sequence": (512, "tokens a sample"),
    "layers": (10, "of the model, query layer included"),
    "hidden": (384, "its width"),
    "heads": (6, "its attention heads"),
    "vocab": (40000, "its ids"),
    "repeats": (8, "turns of each"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    harness.add_counts(parser, COUNTS)
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="everywhere, on all sides (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="all with torch.compile: ours by train.compile, a plain loop's model whole")
    harness.add_threads(parser)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in turns.

    Raises:
        InputError: if an option is impossible, a peer is not installed, or a process ends early.
    """
    harness.check_counts(arguments, *COUNTS, "threads")
    if not 0.0 <= arguments.dropout < 1.0:
        raise InputError(f"--dropout {arguments.dropout}: expected 0 or more, and less than 1.")
    if arguments.hidden % arguments.heads:
        raise InputError(f"--heads {arguments.heads} does not divide --hidden {arguments.hidden}.")
    if not find_spec("transformers"):
        raise InputError("transformers is not installed, and this task compares with it. Install it: pip install transformers.")
    courses = take_turns(every := ways(arguments), arguments.repeats)
    return summary(every, courses, arguments)


def ways(arguments: argparse.Namespace) -> list[Way]:
    """What is compared; ours come first."""
    threads, plain = arguments.threads or harness.cores(), settings(arguments, 0)
    found = [
        *(Way(name, settings(arguments, stage), threads=threads) for stage, name in enumerate(OURS)),
        Way(BARE, plain, "bare", threads=threads),
        Way(GPT2, plain, "gpt2", threads=threads, allocator="default"),
    ]
    return [*found, Way(TUNED, plain, "gpt2", threads=threads, allocator="tuned")] if on_cpu() else found


def summary(ways: Sequence[Way], courses: Mapping[str, Course], arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of what these did."""
    from megatron_ext import accelerator

    if arguments.precision == "fp32" and arguments.dropout == 0.0:
        same_work(courses, [*OURS, BARE])
    sides = {name: _metrics(course, arguments) for name, course in courses.items()}
    speeds = {name: side["all_tokens_per_second"] for name, side in sides.items()}
    peers = {name: side for name, side in sides.items() if name not in OURS}
    all_ratios = {peer: {f"tokens_per_second, {name}": harness.quotients(speeds[name], speeds[peer]) for name in OURS} for peer in peers}
    result: dict[str, Any] = {
        **({} if on_cpu() else {"device": accelerator.device_name()}),
        "model": {
            **{name: getattr(arguments, name) for name in (*COUNTS, "dropout", "precision", "compile")},
            "threads": ways[0].threads,
            "allocators": {way.name: way.allocator for way in ways} if on_cpu() else {},
        },
        "ours": harness.of_ways({name: sides[name] for name in OURS}),
        "peers": peers,
        **harness.paired(all_ratios),
    }
    for peer, side in peers.items():
        result["ratios"][peer] |= {f"peak_bytes, {name}": side["peak_bytes"] / sides[name]["peak_bytes"] for name in OURS}
    return result


def settings(arguments: argparse.Namespace, zero_stage: int) -> dict[str, Any]:
    """The run as pangu.train would be told it."""
    run = harness.run_settings(vars(arguments), arguments.batch, dropout=arguments.dropout, zero_stage=zero_stage)
    run["train"] |= {"precision": arguments.precision, "compile": arguments.compile}
    run["data"] |= {"eod_reset": False}  # GPT-2 has no documents inside a sample; these have none either
    return run | {"optimizer": {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "grad_clip": 1.0}}


def _metrics(course: Course, arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ext import accelerator
    from pangu.config import Config
    from pangu.config.sizes import flops_per_token

    tokens = arguments.batch * arguments.sequence
    found = {
        **harness.median_and_all("tokens_per_second", [tokens / seconds for seconds in course.seconds]),
        "peak_bytes": course.peak_bytes,
    }
    peak_flops = accelerator.peak_flops()
    if peak_flops and arguments.precision == "bf16":
        config = Config.model_validate(settings(arguments, 0))
        found["mfu"] = found["tokens_per_second"] * flops_per_token(config.model, config.train.sequence_length) / peak_flops
    return found


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each way to train."""
    model, ours = result["model"], result["ours"]
    title = (
        f"{model['layers']} layers, hidden {model['hidden']}, {model['heads']} heads, vocabulary {model['vocab']}\n"
        f"batch {model['batch']} x {model['sequence']}, {model['precision']}, dropout {model['dropout']}"
        + (", compiled" if model["compile"] else "")
    )
    caption = f"{result['device']}; {model['threads']} threads"
    table = harness.new_table(title, caption, "", "malloc", "tokens/s", "range", "peak MB", "MFU", no_wrap=False)
    for name, side in {**{name: harness.way_of(ours, name) for name in OURS}, **result["peers"]}.items():
        speed = f"{side['tokens_per_second']:,.0f}", harness.span(side["all_tokens_per_second"], ",.0f"), f"{side['peak_bytes'] / 1e6:,.0f}"
        table.add_row(name, model["allocators"].get(name, ""), *speed, f"{side['mfu']:.1%}" if "mfu" in side else "")
    for peer, metrics_of_peer in result["all_ratios"].items():
        table.add_section()
        table.add_row(f"over {peer}")
        for metric, values in metrics_of_peer.items():
            memory = result["ratios"][peer][metric.replace("tokens_per_second", "peak_bytes")]
            table.add_row(metric.removeprefix("tokens_per_second, "), "", *harness.times(values), f"{memory:.2f}x", "")
    return table
