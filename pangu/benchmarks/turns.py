"""Turns with transformers' GPT-2 of equal shape: what the benchmarks of generation and of scoring share."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pangu.benchmarks.results import median_and_all, of_ways, paired
from pangu.errors import InputError

if TYPE_CHECKING:
    from pangu.config import ModelConfig
    from pangu.inference.generation import TextGenerator
    from pangu.model.model import PanguModel

PEER = "transformers GPT-2"
COUNTS = {
    "layers": (10, "of the model, query layer included"),
    "hidden": (384, "its width"),
    "heads": (6, "its attention heads"),
    "vocab": (40000, "its ids"),
    "repeats": (5, "turns of each"),
}


def add_counts(parser: argparse.ArgumentParser, counts: Mapping[str, tuple[int, str]]) -> None:
    """Options that are whole numbers, given with their default and meaning, and how the time is taken."""
    for name, (default, meaning) in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core that this process may use")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of time on the wall")


def settings(arguments: argparse.Namespace, counts: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Set the number of threads; give what is measured, for the result.

    Raises:
        InputError: if a count is impossible.
    """
    import torch

    for name in (*counts, "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected 1 or more.")
    if arguments.cpu_time and arguments.threads not in (None, 1):
        raise InputError(f"--cpu-time --threads {arguments.threads}: threads that wait for each other use processor time. Take one.")
    if arguments.threads or arguments.cpu_time:
        torch.set_num_threads(arguments.threads or 1)
    values = {name: getattr(arguments, name) for name in counts}
    return {**values, "threads": torch.get_num_threads(), "clock": "processor" if arguments.cpu_time else "wall"}


def model_config(arguments: argparse.Namespace, max_positions: int) -> ModelConfig:
    """The shape that the options ask for."""
    from pangu.config import ModelConfig

    return ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        vocab_size=arguments.vocab,
        max_positions=max_positions,
    )


def random_model(config: ModelConfig, prepare: Callable[[PanguModel], None] = lambda model: None) -> PanguModel:
    """A model of random weights, the same every time."""
    from megatron_ext.context import ParallelContext
    from megatron_ext.initialize import random_weights
    from pangu.model.model import PanguModel

    model = PanguModel(config, ParallelContext(fill=random_weights(1))).eval()
    prepare(model)
    return model


def id_generator(model: PanguModel) -> TextGenerator:
    """A generator whose prompts are lists of ids."""
    from pangu.inference.generation import TextGenerator

    class Ids:
        path, vocab_size = Path("ids"), model.config.vocab_size

        def encode(self, ids: list[int]) -> list[int]:
            return ids

        def decode(self, ids: list[int]) -> str:
            return ""

    return TextGenerator(model, Ids())  # type: ignore[arg-type]


def gpt2(config: ModelConfig) -> Any:
    """The peer, with random weights.

    Raises:
        InputError: if transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and this task compares with it. Install it: pip install transformers.") from None
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_positions,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            bos_token_id=9,
            eos_token_id=9,
        )
    ).eval()


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int, num_tokens: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens a second of each, one number a turn. The first turn warms up and is not counted; every other turn goes backwards."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            began = clock()
            runs[name]()
            speed = num_tokens / (clock() - began)
            if turn:
                speeds[name].append(speed)
                print(f"turn {turn} of {repeats}: {name} {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return speeds


def compare(runs: dict[str, Callable[[], Any]], peers: Mapping[str, str], num_tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let them take turns; give `ours`, `peers`, `ratios` and `all_ratios`.

    Args:
        runs: what to measure, by name: ours, and the `PEER`; or the peer's way to do what one of ours does, `PEER, way`.
        peers: the run of the peer for each of ours; one may serve several.
        num_tokens: of each run.
        arguments: how often, by which clock.
    """
    speeds = take_turns(runs, arguments.repeats, num_tokens, time.process_time if arguments.cpu_time else time.perf_counter)
    ratios = {
        f"tokens_per_second, {name}": [one / other for one, other in zip(speeds[name], speeds[peer], strict=True)]
        for name, peer in peers.items()
    }
    summaries = {name: median_and_all("tokens_per_second", every) for name, every in speeds.items()}
    theirs = {
        metric.replace(f", {PEER}", ""): value
        for metric, value in of_ways({name: summaries[name] for name in dict.fromkeys(peers.values())}).items()
    }
    return {"ours": of_ways({name: summaries[name] for name in peers}), "peers": {PEER: theirs}, **paired({PEER: ratios})}


def speed_table(result: dict[str, Any], title: str) -> Table:
    """Speeds and speed-ups for people: a row for each way."""
    model, ratios = result["model"], result["all_ratios"][PEER]
    table = Table(title=title, caption=f"{result['device']}; {model['threads']} threads, {model['clock']} time")
    for heading in ("", "tokens/s", "range", "speed-up", "range"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for side, metrics in (("", result["ours"]), (PEER, result["peers"][PEER])):
        for metric in (name for name in metrics if name.startswith("tokens_per_second")):
            every, own = metrics[f"all_{metric}"], [] if side else ratios[metric]
            way = metric.removeprefix("tokens_per_second").removeprefix(", ")
            table.add_row(
                ", ".join(filter(None, [side, way])),
                f"{metrics[metric]:.1f}",
                f"{min(every):.1f} .. {max(every):.1f}",
                f"{statistics.median(own):.2f}x" if own else "",
                f"{min(own):.2f} .. {max(own):.2f}" if own else "",
            )
    return table
