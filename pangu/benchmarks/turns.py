"""Turns with transformers' GPT-2 of equal shape: what the benchmarks of generation and of scoring share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.benchmarks import harness
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


def add_arguments(parser: argparse.ArgumentParser, counts: harness.Counts) -> None:
    """Options that are whole numbers, and how the time is taken."""
    harness.add_counts(parser, counts)
    harness.add_threads(parser)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of time on the wall")


def settings(arguments: argparse.Namespace, counts: harness.Counts) -> dict[str, Any]:
    """Set the number of threads; give what is measured, for the result.

    Raises:
        InputError: if a count is impossible.
    """
    import torch

    values = harness.check_counts(arguments, *counts, "threads")
    if arguments.cpu_time and arguments.threads not in (None, 1):
        raise InputError(f"--cpu-time --threads {arguments.threads}: threads that wait for each other use processor time. Take one.")
    if arguments.threads or arguments.cpu_time:
        torch.set_num_threads(arguments.threads or 1)
    return {**values, "threads": torch.get_num_threads(), "clock": "processor" if arguments.cpu_time else "wall"}


def model_config(arguments: argparse.Namespace, max_positions: int) -> ModelConfig:
    """The shape that the options ask for."""
    from pangu.config import ModelConfig

    return ModelConfig.model_validate(harness.model_settings(vars(arguments) | {"sequence": max_positions}))


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
    """transformers' GPT-2 of equal shape, with random weights.

    Raises:
        InputError: if transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and this task compares with it. Install it: pip install transformers.") from None
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        "attn_implementation": "sdpa",
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()


def take_turns(runs: Mapping[str, Callable[[], Any]], repeats: int, num_tokens: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens a second of each, one number a turn. The first turn warms up and is not counted; every other turn goes backwards."""

    def speed(run: Callable[[], Any]) -> float:
        began = clock()
        run()
        return num_tokens / (clock() - began)

    return harness.take_turns({name: partial(speed, run) for name, run in runs.items()}, repeats, warm_up=1, unit="tokens/s")


def compare(runs: dict[str, Callable[[], Any]], peers: Mapping[str, str], num_tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let them take turns; give `ours`, `peers`, `ratios` and `all_ratios`.

    Args:
        runs: what to measure, by name: ours, and the `PEER`; or the peer's way to do what one of ours does, `PEER, way`.
        peers: the run of the peer for each of ours; one may serve several.
        num_tokens: of each run.
        arguments: how often, by which clock.
    """
    speeds = take_turns(runs, arguments.repeats, num_tokens, time.process_time if arguments.cpu_time else time.perf_counter)
    sides = {name: harness.median_and_all("tokens_per_second", every) for name, every in speeds.items()}
    theirs = harness.of_ways({name: sides[name] for name in peers.values()})
    return {
        "ours": harness.of_ways({name: sides[name] for name in peers}),
        "peers": {PEER: {metric.replace(f", {PEER}", ""): value for metric, value in theirs.items()}},
        **harness.paired(
            {PEER: {f"tokens_per_second, {name}": harness.quotients(speeds[name], speeds[peer]) for name, peer in peers.items()}}
        ),
    }
