"""A training step, next to transformers' GPT-2 of equal shape.

Ours is what pangu.train runs: the model in its TrainingEngine, DeepSpeed in it, with ZeRO-0 and with ZeRO-1; the model without the engine
in a plain loop of PyTorch is there to show what the engine costs. GPT-2 (`sdpa`) is in the same plain loop. All have random weights, the
same tokens in memory, the same dropout, torch's fused AdamW with the same settings, and clip the gradient by its norm.

After one step each to warm up they take turns, a step a turn, and each turn's speed is divided by GPT-2's in the same turn. Numbers are
medians over the turns, ranges their least and greatest. Then each trains alone in a process of its own, for its peak memory: resident on
the CPU, imports included; on a device what its tensors took of it. On the CPU much of the time goes into memory that the allocator gives
back and asks for again, so these processes are run once more with glibc's allocator told to keep it (`TUNED`), GPT-2's too.

In bf16 the engine is DeepSpeed's, and the plain loops run under torch.autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.machine import watch
from benchmarks.turns import take_turns
from pangu.errors import InputError

if TYPE_CHECKING:
    import torch

    from pangu.config import Config
    from pangu.data.batches import Batch

OURS, SHARDED, BARE, PEER = "pangu.train, ZeRO-0", "pangu.train, ZeRO-1", "the model alone", "transformers GPT-2"
NAMES = (OURS, SHARDED, BARE, PEER)
COUNTS = {"batch": 4, "sequence": 512, "layers": 10, "hidden": 384, "heads": 6, "vocab": 40000, "repeats": 8}
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
GRAD_CLIP = 1.0
TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
"""GLIBC_TUNABLES: huge pages, and memory that was freed is kept for the next step."""
STEPS_ALONE = 3

Step = Callable[[], float]
"""Takes one optimizer step and returns its loss, which waits for the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    meanings = {
        "batch": "samples a step",
        "sequence": "tokens a sample",
        "layers": "of the model, query layer included",
        "hidden": "its width",
        "heads": "its attention heads",
        "vocab": "its ids",
        "repeats": "turns of each",
    }
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meanings[name]} (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="everywhere, on both sides (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="all with torch.compile: ours by train.compile, a plain loop's model whole")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core that this process may use")
    parser.add_argument("--part", choices=["turns", "alone"], help="only the turns, or only the processes of their own; default: both")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)  # what a process of its own is started with


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in turns, then alone.

    Raises:
        InputError: if an option is impossible, or transformers is not installed.
    """
    for name in (*COUNTS, "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more.")
    if not 0.0 <= arguments.dropout < 1.0:
        raise InputError(f"--dropout {arguments.dropout}: expected 0 or more, and less than 1.")
    if arguments.hidden % arguments.heads:
        raise InputError(f"--heads {arguments.heads} does not divide --hidden {arguments.hidden}.")
    if arguments.only:
        return _alone(arguments)

    from megatron_ext import accelerator
    from pangu.training.report import flops_per_token

    result: dict[str, Any] = {
        "model": {
            **{name: getattr(arguments, name) for name in COUNTS},
            **{name: getattr(arguments, name) for name in ("dropout", "precision", "compile")},
            "optimizer": {**OPTIMIZER, "grad_clip": GRAD_CLIP},
        },
        "ours": {name: {} for name in NAMES[:-1]},
        "peers": {PEER: {}},
        "ratios": {},
        "all_ratios": {},
    }
    sides = {**result["ours"], **result["peers"]}
    if arguments.part != "turns":
        _measure_alone(arguments, result, sides)
    if arguments.part != "alone":
        speeds = _measure_turns(arguments, result)
        peak, flops = accelerator.peak_flops(), flops_per_token(settings(arguments, 0))
        for name, values in speeds.items():
            sides[name] |= {"tokens_per_second": statistics.median(values), "all_tokens_per_second": values}
            if peak and arguments.precision == "bf16":
                sides[name]["mfu"] = statistics.median(values) * flops / peak
    return result


def _measure_turns(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, list[float]]:
    from megatron_ext.collectives import shutdown

    with_world(arguments)
    try:
        runs = {name: build(name, arguments) for name in NAMES}
        speeds = take_turns(runs, arguments.repeats, arguments.batch * arguments.sequence, time.perf_counter)
    finally:
        shutdown()
    import torch

    result["model"]["threads"] = torch.get_num_threads()
    pairs = [(f"speed, {name}", name, PEER) for name in NAMES[:-1]]
    pairs += [(f"{name} over {BARE}", name, BARE) for name in (OURS, SHARDED)]
    for label, first, second in pairs:
        ratios = [own / other for own, other in zip(speeds[first], speeds[second], strict=True)]
        result["ratios"][label], result["all_ratios"][label] = statistics.median(ratios), ratios
    return speeds


def _measure_alone(arguments: argparse.Namespace, result: dict[str, Any], sides: dict[str, dict[str, Any]]) -> None:
    """Memory, and on the CPU speed with a tuned allocator, in a process each."""
    from megatron_ext import accelerator

    on_cpu = accelerator.name() == "cpu"
    words = [f"--{name}={getattr(arguments, name)}" for name in (*COUNTS, "dropout", "precision")]
    words += ["--compile"] if arguments.compile else []
    words += [f"--threads={arguments.threads}"] if arguments.threads else []
    command = [sys.executable, Path(__file__).parents[1] / "benchmark.py", "train", *words, "--json", "--only"]
    for name, allocator in itertools.product((OURS, PEER), ("default", "tuned") if on_cpu else ("default",)):
        print(f"alone: {name}, {allocator} allocator", file=sys.stderr, flush=True)
        usage = watch([*(["env", f"GLIBC_TUNABLES={TUNED}"] if allocator == "tuned" else []), *command, name])
        if usage.exit_code:
            raise InputError(f"{name} failed alone: {(usage.errors.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')}")
        found = json.loads(usage.errors.strip().splitlines()[-1])
        sides[name][f"alone, {allocator} allocator"] = {
            "tokens_per_second": found["tokens_per_second"],
            "peak_bytes": usage.peak_bytes if on_cpu else found["device_bytes"],
        }
    result["ratios"]["memory"] = _alone_of(sides[PEER], "peak_bytes") / _alone_of(sides[OURS], "peak_bytes")
    if on_cpu:
        tuned = _alone_of(sides[OURS], "tokens_per_second", "tuned") / _alone_of(sides[PEER], "tokens_per_second", "tuned")
        result["ratios"]["speed, both alone with a tuned allocator"] = tuned


def _alone_of(side: dict[str, Any], key: str, allocator: str = "default") -> float:
    return side[f"alone, {allocator} allocator"][key]


def _alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: train a few steps and say how it went on the last line of standard error."""
    from megatron_ext import accelerator
    from megatron_ext.collectives import shutdown

    with_world(arguments)
    run = {arguments.only: build(arguments.only, arguments)}
    speeds = take_turns(run, STEPS_ALONE, arguments.batch * arguments.sequence, time.perf_counter)
    shutdown()
    found = {"tokens_per_second": statistics.median(speeds[arguments.only]), "device_bytes": accelerator.max_memory_allocated()}
    print(json.dumps(found), file=sys.stderr)
    return found


def with_world(arguments: argparse.Namespace) -> None:
    """Make this process a world of one, with as many threads as were asked for."""
    import torch

    from megatron_ext import accelerator

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not accelerator.supports(arguments.precision):
        raise InputError(f"--precision {arguments.precision}: {accelerator.device_name()} does not train in it. Choose fp32.")
    accelerator.initialize(60)


def settings(arguments: argparse.Namespace, zero_stage: int) -> Config:
    """The run as pangu.train would be told it."""
    from pangu.config import Config

    return Config.model_validate(
        {
            "model": {
                "num_layers": arguments.layers,
                "hidden_size": arguments.hidden,
                "num_heads": arguments.heads,
                "vocab_size": arguments.vocab,
                "max_positions": arguments.sequence,
                "hidden_dropout": arguments.dropout,
                "attention_dropout": arguments.dropout,
            },
            "parallel": {"zero_stage": zero_stage},
            "train": {"micro_batch_size": arguments.batch, "global_batch_size": arguments.batch, "steps": 1000}
            | {"precision": arguments.precision, "compile": arguments.compile},
            "optimizer": {"name": "adamw", **OPTIMIZER, "grad_clip": GRAD_CLIP},
            # GPT-2 has no documents inside a sample; these have none either.
            "data": {"train": "in memory", "eod_reset": False},
            "run": {"dir": "none"},
        }
    )


def build(name: str, arguments: argparse.Namespace) -> Step:
    """One of `NAMES`, ready to step."""
    if name == PEER:
        return _gpt2(arguments)
    return _bare(arguments) if name == BARE else _engine(arguments, 0 if name == OURS else 1)


def batch_of(config: Config) -> Batch:
    """Random tokens without separators or padding."""
    import numpy as np

    from pangu.data.batches import collate

    model, train = config.model, config.train
    shape = (train.micro_batch_size, train.sequence_length + 1)
    samples = np.random.default_rng(1).integers(min(10, model.vocab_size - 1), model.vocab_size, shape)
    return collate(samples, separator_id=model.separator_id, pad_id=model.pad_id, eod_reset=False)


def _engine(arguments: argparse.Namespace, zero_stage: int) -> Step:
    from megatron_ext.initialize import random_weights
    from megatron_ext.topology import Groups
    from pangu.layout import validate_layout
    from pangu.training.engine import TrainingEngine

    config = settings(arguments, zero_stage)
    engine = TrainingEngine(config, Groups.create(validate_layout(config, 1)), random_weights(1))
    batches = itertools.repeat(batch_of(config))
    return lambda: engine.train_step(batches, config.optimizer.lr).loss


def _bare(arguments: argparse.Namespace) -> Step:
    from megatron_ext import accelerator
    from megatron_ext.context import ParallelContext
    from megatron_ext.initialize import random_weights
    from pangu.model.model import PanguModel

    config = settings(arguments, 0)
    model = PanguModel(config.model, ParallelContext(device=accelerator.device(), fill=random_weights(1)))
    batch = batch_of(config)
    inputs = [x.to(accelerator.device()) for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)]
    return _plain_loop(model, lambda: model(*inputs), arguments)


def _gpt2(arguments: argparse.Namespace) -> Step:
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and this task compares with it. Install it: pip install transformers.") from None
    import torch

    from megatron_ext import accelerator

    shape: dict[str, Any] = {
        "vocab_size": arguments.vocab,
        "n_positions": arguments.sequence,
        "n_embd": arguments.hidden,
        "n_layer": arguments.layers,
        "n_head": arguments.heads,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), arguments.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(1)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model = model.to(accelerator.device())
    tokens = batch_of(settings(arguments, 0)).tokens.to(accelerator.device())
    return _plain_loop(model, lambda: model(input_ids=tokens, labels=tokens).loss, arguments)


def _plain_loop(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], arguments: argparse.Namespace) -> Step:
    """A step as a short script of PyTorch would take it."""
    import torch

    from megatron_ext import accelerator

    model.train()
    if arguments.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)  # type: ignore[arg-type]

    def step() -> float:
        autocast = torch.autocast(accelerator.name(), torch.bfloat16) if arguments.precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def table(result: dict[str, Any]) -> Table:
    """The result for people: a column for each way to train."""
    model, ratios, spread = result["model"], result["ratios"], result["all_ratios"]
    title = (
        f"{model['layers']} layers, hidden {model['hidden']}, {model['heads']} heads, vocabulary {model['vocab']}\n"
        f"batch {model['batch']} x {model['sequence']}, {model['precision']}, dropout {model['dropout']}, fused AdamW"
        + (", compiled" if model["compile"] else "")
    )
    sides = {**result["ours"], **result["peers"]}
    table = Table(title=title, caption=result["device"] + (f"; {model['threads']} threads" if "threads" in model else ""))
    table.add_column("", no_wrap=True)
    for name in sides:
        table.add_column(name.replace(", ", "\n").replace("transformers ", "").replace(" alone", "\nalone"), justify="right", no_wrap=True)

    def row(label: str, cell: Callable[[str, dict[str, Any]], str]) -> None:
        cells = [cell(name, one) for name, one in sides.items()]
        if any(cells):
            table.add_row(label, *cells)

    def spread_of(values: list[float] | None, digits: int) -> str:
        return f"{min(values):,.{digits}f}..{max(values):,.{digits}f}" if values else ""

    def alone(allocator: str, key: str, unit: float) -> Callable[[str, dict[str, Any]], str]:
        found = {name: one.get(f"alone, {allocator} allocator") for name, one in sides.items()}
        return lambda name, one: f"{own[key] / unit:,.0f}" if (own := found[name]) else ""

    def ratio(label: str) -> str:
        return f"{ratios[label]:.2f}x" if label in ratios else ""

    row("tokens/s", lambda name, one: f"{one['tokens_per_second']:,.0f}" if "tokens_per_second" in one else "")
    row("  range", lambda name, one: spread_of(one.get("all_tokens_per_second"), 0))
    row("over GPT-2", lambda name, one: ratio(f"speed, {name}"))
    row("  range", lambda name, one: spread_of(spread.get(f"speed, {name}"), 2))
    row("over the model alone", lambda name, one: ratio(f"{name} over {BARE}"))
    row("  range", lambda name, one: spread_of(spread.get(f"{name} over {BARE}"), 2))
    row("MFU", lambda name, one: f"{one['mfu']:.1%}" if "mfu" in one else "")
    row("own process: tokens/s", alone("default", "tokens_per_second", 1))
    row("  peak MB", alone("default", "peak_bytes", 1e6))
    row("  tuned malloc", alone("tuned", "tokens_per_second", 1))
    row("  peak MB", alone("tuned", "peak_bytes", 1e6))
    return table
