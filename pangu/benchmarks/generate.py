"""Greedy decoding, next to transformers' GPT-2 of equal shape.

Both have random weights in fp32, the same prompts, as many threads, and a cache of keys and values; this project decodes once more with
8-bit weights (`pangu.generate --int8`). After one run each to warm up, the three take turns, and each turn's speed is divided by GPT-2's
in the same turn, so that what else the machine does bears on all alike. Numbers are medians over the turns, ranges their least and
greatest. Whether the ids that fp32 decodes are those of computing everything again for each token,
with weights as they come, is said too. On a machine with other
work, --cpu-time takes one thread and its processor time, which others disturb less.

With --weights and --text it says how exact the 8-bit weights are instead: the perplexity of the text's lines, each a document, with fp32
and with 8-bit weights, and for how many of the tokens the likeliest one is the same. Take trained weights: random ones say little.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pangu.benchmarks import harness, turns
from pangu.errors import InputError

if TYPE_CHECKING:
    from pangu.config import ModelConfig
    from pangu.inference.generation import TextGenerator
    from pangu.model.model import PanguModel

EXACT = "fp32 weights"
COUNTS = {
    "batch": (1, "prompts computed at once"),
    "prompt": (64, "tokens of each prompt"),
    "new": (128, "tokens to generate"),
    **turns.COUNTS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task."""
    turns.add_arguments(parser, COUNTS)
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
    model = turns.settings(arguments, COUNTS)

    import torch

    from pangu.inference.cpu_weights import arrange_for_cpu, quantize

    config = turns.model_config(arguments, arguments.prompt + arguments.new)
    shape = (arguments.batch, arguments.prompt)
    prompts = torch.randint(10, arguments.vocab, shape, generator=torch.Generator().manual_seed(1)).tolist()
    runs = {
        name: _decoder(turns.id_generator(turns.random_model(config, prepare)), prompts, arguments.new)
        for name, prepare in (("fp32", arrange_for_cpu), ("int8", quantize))
    }
    runs[turns.PEER] = _peer(config, prompts, arguments.new)
    same = runs["fp32"]() == recomputed(turns.random_model(config), prompts, arguments.new)
    peers = {"fp32": turns.PEER, "int8": turns.PEER}
    return {
        "model": model,
        "same_ids_as_recomputation": same,
        **turns.compare(runs, peers, arguments.batch * arguments.new, arguments),
    }


def _decoder(own: TextGenerator, prompts: list[list[int]], num_new: int) -> Callable[[], list[list[int]]]:
    return lambda: [one.ids for one in own.generate(prompts, max_new_tokens=num_new, temperature=0, stop_ids=())]  # type: ignore[arg-type]


def _peer(config: ModelConfig, prompts: list[list[int]], num_new: int) -> Callable[[], list[list[int]]]:
    import torch

    model = turns.gpt2(config)
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
        "ours": {"perplexity": perplexity["int8"], "same_likeliest_token": same / count},
        "peers": {EXACT: {"perplexity": perplexity["fp32"], "same_likeliest_token": 1.0}},
        "ratios": {EXACT: {"perplexity": perplexity["fp32"] / perplexity["int8"], "same_likeliest_token": same / count}},
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people: a row for each way to decode."""
    if EXACT in result["peers"]:
        return _exactness_table(result)
    model = result["model"]
    return harness.speed_table(
        result,
        f"greedy, batch {model['batch']}, prompt {model['prompt']} + {model['new']} new; {model['layers']} layers, hidden "
        f"{model['hidden']}, vocabulary {model['vocab']}\nfp32 ids equal recomputation without a cache: "
        + ("yes" if result["same_ids_as_recomputation"] else "NO"),
        f"{result['device']}; {model['threads']} threads, {model['clock']} time",
        *("tokens_per_second", "tokens/s", ".1f"),
    )


def _exactness_table(result: dict[str, Any]) -> Table:
    model, same = result["model"], result["ours"]["same_likeliest_token"]
    title = f"{model['tokens']:,} tokens; the likeliest token is the same for {same:.2%}"
    table = harness.new_table(title, result["device"], "weights", "perplexity")
    for name, one in (("8 bits", result["ours"]), (EXACT, result["peers"][EXACT])):
        table.add_row(name, f"{one['perplexity']:.4f}")
    return table
