"""Text that continues a prompt.

    generator = TextGenerator.from_directory("runs/quickstart/weights")
    [answer] = generator.generate(["四川的省会是?"], max_new_tokens=20, temperature=0)
    print(answer.text)

Started by torchrun, each process holds a slice of the model (tensor parallelism) and all return the same.
Shapes: B prompts, S columns computed at once, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_ext import accelerator
from megatron_ext.collectives import broadcast, world_size
from megatron_ext.context import ParallelContext
from megatron_ext.random import derive_seed
from megatron_ext.topology import SINGLE, Groups, Topology
from pangu.conversion.formats import open_weights
from pangu.errors import InputError
from pangu.inference.kv_cache import make_caches
from pangu.inference.sampling import Sampling, sample
from pangu.model.block import Cache
from pangu.model.model import PanguModel, gather_logits
from pangu.tokenizer import PanguTokenizer

DEFAULT_NEW_TOKENS = 100
COLLECTIVE_TIMEOUT_SECONDS = 1800.0
"""The first collective waits for the slowest rank to read its weights."""


@dataclass(frozen=True)
class Generation:
    """What continues one prompt."""

    text: str
    """The ids decoded by themselves. Never cut it out of the decoded whole: the tokenizer's NFKC changes the prompt's length."""
    ids: list[int]
    """The new tokens, without the one that ended the text."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended the text. `length`: the text reached `max_new_tokens`."""


class TextGenerator:
    """A model and its tokenizer.

    Args:
        model: the whole model, or this rank's slice of it; it is put into evaluation mode. No sequence parallelism.
        tokenizer: with no more ids than the model; ids that only the model has are never generated.

    Raises:
        InputError: if the tokenizer has more ids than the model.
    """

    def __init__(self, model: PanguModel, tokenizer: PanguTokenizer) -> None:
        assert not model.context.sequence_parallel, "one token at a time cannot be split along the sequence"
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(
                f"{tokenizer.path} has {tokenizer.vocab_size} ids, but the model only {model.config.vocab_size}. "
                "Use the tokenizer that the model was trained with."
            )
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_directory(cls, path: Path | str) -> TextGenerator:
        """Load weights of any format with the `vocab.model` beside them; under torchrun, split over all processes.

        Weights keep their dtype on an accelerator and become fp32 on a CPU, where 16 bits are slow.

        Raises:
            InputError: if the weights or their tokenizer are not usable, or the processes do not divide the model's heads.
        """
        weights = open_weights(path)
        if weights.tokenizer is None:
            raise InputError(f"{path}: no vocab.model lies beside the weights. Put the one there that the model was trained with.")
        tokenizer = PanguTokenizer(weights.tokenizer)
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if weights.config.num_heads % num_ranks:
            raise InputError(
                f"{num_ranks} processes do not divide the {weights.config.num_heads} attention heads of {path}. "
                "Start as many processes as divide them (torchrun --nproc-per-node N)."
            )
        group = SINGLE
        if num_ranks > 1:
            accelerator.initialize(COLLECTIVE_TIMEOUT_SECONDS)
            group = Groups.create(Topology.from_world_size(world_size(), tensor=world_size(), pipeline=1)).tensor
        device = accelerator.device()
        dtype = torch.float32 if device.type == "cpu" or weights.dtype == torch.float64 else weights.dtype
        return cls(PanguModel(weights.config, ParallelContext(tensor=group, device=device, dtype=dtype, fill=weights.fill)), tokenizer)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 1234,
        stop_ids: Collection[int] | None = None,
    ) -> list[Generation]:
        """Continue each prompt, all of them in one batch.

        A prompt's continuation depends on the prompt and its seed, not on the prompts beside it.

        Args:
            prompts: texts; an empty one continues the separator, which is how a document begins.
            max_new_tokens: at most so many a prompt. None: `DEFAULT_NEW_TOKENS`, or what the longest prompt leaves of the window.
            temperature: see `Sampling`; 0 is greedy.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            seed: one number of 0 or more for all prompts, or one a prompt, to draw several continuations of the same prompt.
            stop_ids: tokens that end a text; None means the model's document separator.

        Returns:
            One continuation a prompt, in order.

        Raises:
            InputError: if a value is out of its range, or a prompt and its continuation exceed the window.
        """
        sampling = Sampling(temperature, top_k, top_p)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts) or min(seeds, default=0) < 0:
            raise InputError(f"seed = {seed}; expected one number of 0 or more, or {len(prompts)} of them, one a prompt.")
        if not prompts:
            return []
        separator_id = self.model.config.separator_id
        encoded = [self.tokenizer.encode(prompt) or [separator_id] for prompt in prompts]
        num_new = self._num_new_tokens(encoded, max_new_tokens)
        stops = {separator_id} if stop_ids is None else set(stop_ids)
        generators = [torch.Generator().manual_seed(derive_seed(number)) for number in seeds]
        new_ids: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for ids in self._stream(encoded, num_new, sampling, generators):
            for row in list(running):
                if ids[row] in stops:
                    running.remove(row)
                else:
                    new_ids[row].append(ids[row])
            if not running:
                break
        return [Generation(self.tokenizer.decode(ids), ids, "length" if row in running else "stop") for row, ids in enumerate(new_ids)]

    def _num_new_tokens(self, encoded: list[list[int]], asked: int | None) -> int:
        """How many tokens to generate, all prompts given as ids. Raises InputError where they do not fit into the window."""
        if asked is not None and asked < 1:
            raise InputError(f"max_new_tokens = {asked}; expected 1 or more.")
        lengths = [len(ids) for ids in encoded]
        longest, window = max(lengths), self.model.config.max_positions
        room, wanted = window - longest, asked or 1
        if room >= wanted:
            return asked or min(DEFAULT_NEW_TOKENS, room)
        which = f"prompt {1 + lengths.index(longest)} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
        raise InputError(
            f"{which} takes {longest:,} positions and max_new_tokens {wanted:,} more, but the model's window has {window:,}. "
            + (f"Set max_new_tokens to {room:,} or less, or shorten the prompt." if room > 0 else "Shorten the prompt.")
        )

    @torch.inference_mode()
    def _stream(
        self, encoded: list[list[int]], num_new: int, sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> Iterator[list[int]]:
        """The next token of every row, `num_new` times. A row that has ended goes on, so that the batch keeps its shape."""
        group, device = self.model.context.tensor, self.model.wte.weight.device
        longest = max(map(len, encoded))
        padding_B = torch.tensor([longest - len(ids) for ids in encoded])
        caches = make_caches(self.model, padding_B, longest + num_new - 1)  # the last token is not computed with
        pad_id = self.model.config.pad_id
        tokens_BS = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in encoded], device=device)
        columns_S = torch.arange(longest)
        for step in range(num_new):
            position_ids_BS = (columns_S - padding_B.unsqueeze(-1)).clamp(min=0).to(device)
            logits_BV = self._next_logits(tokens_BS, position_ids_BS, caches)
            # The ranks' logits are equal; that their choices are must not hang on the last bit of a sum.
            chosen_B = broadcast(sample(logits_BV, sampling, generators), group, source=0)
            yield chosen_B.tolist()
            tokens_BS, columns_S = chosen_B.unsqueeze(-1), torch.tensor([longest + step])

    def _next_logits(self, tokens_BS: Tensor, position_ids_BS: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Logits of the token after the last column: [B, V], V being the tokenizer's ids, equal on every rank."""
        last_B1H = self.model.hidden(tokens_BS, position_ids_BS, caches)[:, -1:]
        logits_BV = gather_logits(
            self.model.wte.logits(last_B1H), vocab_size=self.tokenizer.vocab_size, group=self.model.context.tensor
        ).squeeze(1)
        if logits_BV.isnan().any():
            raise InputError(
                f"the model's scores are not numbers (computed in {logits_BV.dtype}): the weights are damaged, or too large for this "
                "dtype. Convert them with tools/convert_checkpoint.py --dtype bf16 or fp32, or fetch them again."
            )
        return logits_BV
