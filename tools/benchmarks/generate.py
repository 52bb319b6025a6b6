"""Greedy decoding, next to transformers' GPT-2 of equal shape.

Both have random weights in fp32, the same prompts, as many threads, and a cache of keys and values; this project decodes once more with
8-bit weights (`pangu.generate --int8`). After one run each to warm up, the three take turns, and each turn's speed is divided by GPT-2's
in the same turn, so that what else the machine does bears on all alike. Numbers are medians over the turns, ranges their least and
greatest. Whether the ids that fp32 decodes are those of computing everything again for each token is said too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pangu.errors import InputError

if TYPE_CHECKING:
    from pangu.config import ModelConfig
    from pangu.inference.generation import TextGenerator
    from pangu.model.model import PanguModel

PEER = "transformers GPT-2"
COUNTS = {"batch": 1, "prompt": 64, "new": 128, "layers": 10, "hidden": 384, "heads": 6, "vocab": 40000, "repeats": 5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    meanings = {
        "batch": "prompts computed at once",
        "prompt": "tokens of each prompt",
        "new": "tokens to generate",
        "layers": "of the model, query layer included",
        "hidden": "its width",
        "heads": "its attention heads",
        "vocab": "its ids",
        "repeats": "turns of each",
    }
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meanings[name]} (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core that this process may use")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode in turns.

    Raises:
        InputError: if an option is impossible or transformers is not installed.
    """
    for name in (*COUNTS, "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more.")

    import torch

    from pangu.config import ModelConfig
    from pangu.inference.cpu_weights import arrange_for_cpu, quantize

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        vocab_size=arguments.vocab,
        max_positions=arguments.prompt + arguments.new,
    )
    shape = (arguments.batch, arguments.prompt)
    prompts = torch.randint(10, arguments.vocab, shape, generator=torch.Generator().manual_seed(1)).tolist()
    ours, int8 = generator(config, arrange_for_cpu), generator(config, quantize)
    runs = {"fp32": _decoder(ours, prompts, arguments.new), "int8": _decoder(int8, prompts, arguments.new)}
    runs[PEER] = _peer(config, prompts, arguments.new)
    same = runs["fp32"]() == recomputed(ours.model, prompts, arguments.new)
    speeds = take_turns(runs, arguments.repeats, arguments.batch * arguments.new)
    ratios = {name: [own / peer for own, peer in zip(speeds[name], speeds[PEER], strict=True)] for name in speeds if name != PEER}
    return {
        "model": {name: getattr(arguments, name) for name in COUNTS} | {"threads": torch.get_num_threads()},
        "same_ids_as_recomputation": same,
        "ours": {name: _summary(speeds[name]) for name in ratios},
        "peers": {PEER: _summary(speeds[PEER])},
        "ratios": {f"speed, {name}": statistics.median(values) for name, values in ratios.items()},
        "all_ratios": {f"speed, {name}": values for name, values in ratios.items()},
    }


def _summary(speeds: list[float]) -> dict[str, Any]:
    return {"tokens_per_second": statistics.median(speeds), "all_tokens_per_second": speeds}


def generator(config: ModelConfig, prepare: Callable[[PanguModel], None]) -> TextGenerator:
    """A generator of random weights whose prompts are lists of ids."""
    from megatron_ext.context import ParallelContext
    from megatron_ext.initialize import random_weights
    from pangu.inference.generation import TextGenerator
    from pangu.model.model import PanguModel

    class Ids:
        path, vocab_size = Path("ids"), config.vocab_size

        def encode(self, ids: list[int]) -> list[int]:
            return ids

        def decode(self, ids: list[int]) -> str:
            return ""

    model = PanguModel(config, ParallelContext(fill=random_weights(1))).eval()
    prepare(model)
    return TextGenerator(model, Ids())  # type: ignore[arg-type]


def _decoder(own: TextGenerator, prompts: list[list[int]], num_new: int) -> Callable[[], list[list[int]]]:
    return lambda: [one.ids for one in own.generate(prompts, max_new_tokens=num_new, temperature=0, stop_ids=())]  # type: ignore[arg-type]


def _peer(config: ModelConfig, prompts: list[list[int]], num_new: int) -> Callable[[], list[list[int]]]:
    import torch

    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and this task compares with it. Install it: pip install transformers.") from None
    model = transformers.GPT2LMHeadModel(
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
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, config.pad_id
    tokens = torch.tensor(prompts)

    def decode() -> list[list[int]]:
        with torch.inference_mode():
            whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_new, do_sample=False)
        assert whole.shape[1] == tokens.shape[1] + num_new
        return whole[:, tokens.shape[1] :].tolist()

    return decode


def recomputed(model: PanguModel, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Greedy decoding without a cache, the prompts of one length."""
    import torch

    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(num_new):
            last = model.hidden(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))[:, -1:]
            tokens = torch.cat([tokens, model.wte.logits(last).argmax(dim=-1)], dim=1)
    return tokens[:, -num_new:].tolist()


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int, num_tokens: int) -> dict[str, list[float]]:
    """Tokens a second of each, one number a turn. The first turn warms up and is not counted; every other turn goes backwards."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            runs[name]()
            speed = num_tokens / (time.perf_counter() - began)
            if turn:
                speeds[name].append(speed)
                print(f"turn {turn} of {repeats}: {name} {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return speeds


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each way to decode."""
    model, ratios = result["model"], result["all_ratios"]
    table = Table(
        title=f"greedy, batch {model['batch']}, prompt {model['prompt']} + {model['new']} new; {model['layers']} layers, hidden "
        f"{model['hidden']}, vocabulary {model['vocab']}\nfp32 ids equal recomputation without a cache: "
        + ("yes" if result["same_ids_as_recomputation"] else "NO"),
        caption=f"{result['device']}; {model['threads']} threads",
    )
    for heading in ("", "tokens/s", "range", "speed-up", "range"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, one in {**result["ours"], **result["peers"]}.items():
        every, own = one["all_tokens_per_second"], ratios.get(f"speed, {name}")
        table.add_row(
            name,
            f"{one['tokens_per_second']:.1f}",
            f"{min(every):.1f} .. {max(every):.1f}",
            f"{statistics.median(own):.2f}x" if own else "",
            f"{min(own):.2f} .. {max(own):.2f}" if own else "",
        )
    return table
