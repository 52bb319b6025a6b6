"""Greedy decoding, next to transformers' GPT-2 of equal shape.

Both have random weights in fp32, the same prompts, as many threads, and a cache of keys and values; this project decodes once more with
8-bit weights (`pangu.generate --int8`). After one run each to warm up, the three take turns, and each turn's speed is divided by GPT-2's
in the same turn, so that what else the machine does bears on all alike. Numbers are medians over the turns, ranges their least and
greatest. Whether the ids that fp32 decodes are those of computing everything again for each token is said too. On a machine with other
work, --cpu-time takes one thread and its processor time, which others disturb less.

With --weights and --text it says how exact the 8-bit weights are instead: the perplexity of the text's lines, each a document, with fp32
and with 8-bit weights, and for how many of the tokens the likeliest one is the same. Take trained weights: random ones say little.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.turns import summary, take_turns
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
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of time on the wall")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="trained weights with their vocab.model; needs --text")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what they read, in UTF-8; needs --weights")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode in turns.

    Raises:
        InputError: if an option is impossible, a file is not usable, or transformers is not installed.
    """
    if (arguments.weights is None) != (arguments.text is None):
        raise InputError("--weights and --text go together. Give both to measure exactness, or neither to measure speed.")
    if arguments.weights:
        return exactness(arguments.weights, arguments.text)
    for name in (*COUNTS, "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more.")

    import torch

    from pangu.config import ModelConfig
    from pangu.inference.cpu_weights import arrange_for_cpu, quantize

    if arguments.cpu_time and arguments.threads not in (None, 1):
        raise InputError(f"--cpu-time --threads {arguments.threads}: threads that wait for each other use processor time. Take one.")
    if arguments.threads or arguments.cpu_time:
        torch.set_num_threads(arguments.threads or 1)
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
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    speeds = take_turns(runs, arguments.repeats, arguments.batch * arguments.new, clock)
    ratios = {name: [own / peer for own, peer in zip(speeds[name], speeds[PEER], strict=True)] for name in speeds if name != PEER}
    return {
        "model": {
            **{name: getattr(arguments, name) for name in COUNTS},
            "threads": torch.get_num_threads(),
            "clock": "processor" if arguments.cpu_time else "wall",
        },
        "same_ids_as_recomputation": same,
        "ours": {name: summary(speeds[name]) for name in ratios},
        "peers": {PEER: summary(speeds[PEER])},
        "ratios": {f"speed, {name}": statistics.median(values) for name, values in ratios.items()},
        "all_ratios": {f"speed, {name}": values for name, values in ratios.items()},
    }


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


def exactness(weights: Path, text: Path) -> dict[str, Any]:
    """What 8-bit weights change about the lines of a text, each read as a document of its own, no longer than the window."""
    import torch
    import torch.nn.functional as F

    from pangu.inference.generation import TextGenerator

    try:
        lines = text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {text}: cannot be read as UTF-8 ({error}).") from None
    exact, near = TextGenerator.from_directory(weights), TextGenerator.from_directory(weights, int8=True)
    config = exact.model.config
    documents = [[*ids[: config.max_positions], config.separator_id] for line in lines if (ids := exact.tokenizer.encode(line))]
    if not documents:
        raise InputError(f"--text {text}: has no text. Name a file with lines of it.")
    loss, same, count = {"fp32": 0.0, "int8": 0.0}, 0, 0
    for ids in documents:
        tokens, positions, labels = torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1).unsqueeze(0), torch.tensor(ids[1:])
        with torch.inference_mode():
            logits = {name: own.model.logits(tokens, positions)[0] for name, own in (("fp32", exact), ("int8", near))}
        for name, scores in logits.items():
            loss[name] += F.cross_entropy(scores, labels, reduction="sum").item()
        same += int((logits["fp32"].argmax(dim=-1) == logits["int8"].argmax(dim=-1)).sum())
        count += len(labels)
    perplexity = {name: math.exp(total / count) for name, total in loss.items()}
    return {
        "model": {"weights": str(weights), "text": str(text), "tokens": count},
        "ours": {name: {"perplexity": value} for name, value in perplexity.items()},
        "peers": {},
        "ratios": {"fp32's perplexity over int8's": perplexity["fp32"] / perplexity["int8"], "same likeliest token": same / count},
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each way to decode."""
    if not result["peers"]:
        return _exactness_table(result)
    model, ratios = result["model"], result["all_ratios"]
    table = Table(
        title=f"greedy, batch {model['batch']}, prompt {model['prompt']} + {model['new']} new; {model['layers']} layers, hidden "
        f"{model['hidden']}, vocabulary {model['vocab']}\nfp32 ids equal recomputation without a cache: "
        + ("yes" if result["same_ids_as_recomputation"] else "NO"),
        caption=f"{result['device']}; {model['threads']} threads, {model['clock']} time",
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


def _exactness_table(result: dict[str, Any]) -> Table:
    model, same = result["model"], result["ratios"]["same likeliest token"]
    table = Table(title=f"{model['tokens']:,} tokens; the likeliest token is the same for {same:.2%}", caption=result["device"])
    table.add_column("weights")
    table.add_column("perplexity", justify="right")
    for name, one in result["ours"].items():
        table.add_row(name, f"{one['perplexity']:.4f}")
    return table
