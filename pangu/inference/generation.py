"""Generates text that continues a prompt.

    generator = TextGenerator.from_directory("runs/quickstart/weights")
    [answer] = generator.generate(["四川的省会是?"], max_new_tokens=20, temperature=0)
    print(answer.text)

Under torchrun each process holds a slice of the model (tensor parallelism) and all return the same text.
Shapes: B prompts, S columns computed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.collectives import broadcast
from megatron_ext.random import derive_seed
from pangu.errors import InputError
from pangu.inference.kv_cache import make_caches
from pangu.inference.loading import load
from pangu.inference.sampling import Penalties, Sampling, sample
from pangu.inference.streaming import TextStream, decoded_stops
from pangu.model.block import Cache
from pangu.model.model import PanguModel, gather_logits
from pangu.text.tokenizer import PanguTokenizer

DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt."""

    text: str
    """The decoded continuation. Do not cut it out of the decoded whole: the tokenizer's NFKC changes the length of the prompt."""
    ids: list[int]
    """Ids of the new tokens, without the stop token that ended the text but with those that spell a stop string."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token or a stop string ended the text. `length`: it reached `max_new_tokens`, or the end of the window."""
    logprobs: list[float] = field(default_factory=list, compare=False)
    """Natural logarithm of the probability of each of `ids`, before temperature, penalties, top-k and top-p. The last bits
    depend on the batch and on the number of processes, so that they are not compared by `==`."""


class _Row:
    """One unfinished continuation. Its text is decoded only if it is needed: for stop strings, or for the caller."""

    def __init__(self, limit: int, stream: TextStream | None) -> None:
        self.limit, self.stream = limit, stream
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: Literal["stop", "length", ""] = ""

    def add(self, token_id: int, logprob: float, ends: Collection[int]) -> str:
        """Append the next token; return the text that has become certain."""
        if token_id in ends:
            self.finish_reason = "stop"
            return self.stream.end() if self.stream else ""
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        piece = self.stream.add(token_id) if self.stream else ""
        if self.stream and self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
            piece += self.stream.end() if self.stream else ""
        return piece

    def generation(self, tokenizer: PanguTokenizer) -> Generation:
        """The finished continuation."""
        assert self.finish_reason
        text = self.stream.text if self.stream else tokenizer.decode(self.ids)
        return Generation(text, self.ids, self.finish_reason, self.logprobs)


class TextGenerator:
    """Generates text with a model and its tokenizer.

    Args:
        model: the whole model, or this rank's slice of it; it is put into evaluation mode. No sequence parallelism.
        tokenizer: a tokenizer with at most as many ids as the model; ids that only the model has are never generated.

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
    def from_directory(cls, path: Path | str, *, int8: bool = False) -> TextGenerator:
        """Load weights of any format with the `vocab.model` beside them; under torchrun, split over all processes.

        Args:
            path: the weights (see `pangu.inference.loading`).
            int8: compute with 8-bit weights; one process on a CPU.

        Raises:
            InputError: if the weights or their tokenizer are not usable, the processes do not divide the model's heads, or `int8` is
                asked of an accelerator or of several processes.
        """
        loaded = load(Path(path), int8=int8)
        return cls(loaded.model, loaded.tokenizer)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        num_samples: int = 1,
        seed: int | Sequence[int] = 1234,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] | None = None,
        truncate_prompts: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Continue each prompt, all of them in one batch.

        A prompt's continuation depends on the prompt and its seed, not on the prompts beside it.

        Args:
            prompts: texts; an empty one continues the separator, which is how a document begins.
            max_new_tokens: maximum number of new tokens per prompt. None: `DEFAULT_NEW_TOKENS`, or what fits into the window after the
                prompt.
            num_samples: number of continuations per prompt, adjacent in the result; the prompt is computed once.
            seed: one number of 0 or more for all prompts, or one per prompt. Sample j of a prompt uses its seed + j.
            stop: strings that end a text and are not part of it, in the tokenizer's spelling or any that it folds to that.
            stop_ids: tokens that end a text; None means the model's document separator.
            truncate_prompts: drop the beginning of a prompt that leaves too little of the window, instead of refusing it.
            on_text: called with the index of a continuation in the result and its next characters, as soon as they are certain.
                Concatenated, they are its text. Under torchrun every process calls its own.
            sampling: the fields of `Sampling`.

        Returns:
            `num_samples` continuations per prompt, in order.

        Raises:
            InputError: if a value is out of its range, or a prompt and its continuation exceed the window.
        """
        how = Sampling(**sampling)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts) or min(seeds, default=0) < 0:
            raise InputError(f"seed = {seed}; expected one number of 0 or more, or {len(prompts)} of them, one per prompt.")
        if num_samples < 1:
            raise InputError(f"num_samples = {num_samples}; expected 1 or more.")
        stops = decoded_stops(stop, self.tokenizer)
        if not prompts:
            return []
        separator_id = self.model.config.separator_id
        encoded = [self.tokenizer.encode(prompt) or [separator_id] for prompt in prompts]
        if truncate_prompts:
            encoded = [ids[-max(1, self.model.config.max_positions - (max_new_tokens or DEFAULT_NEW_TOKENS)) :] for ids in encoded]
        limits = [limit for limit in self._limits(encoded, max_new_tokens) for _ in range(num_samples)]
        ends = {separator_id} if stop_ids is None else set(stop_ids)
        generators = [torch.Generator().manual_seed(derive_seed(first + j)) for first in seeds for j in range(num_samples)]
        watched = bool(stops or on_text)
        rows = [_Row(limit, TextStream(self.tokenizer.decode, stops) if watched else None) for limit in limits]
        running = set(range(len(rows)))
        for ids, logprobs in self._stream(encoded, max(limits), num_samples, how, generators):
            for row in sorted(running):
                piece = rows[row].add(ids[row], logprobs[row], ends)
                if on_text and piece:
                    on_text(row, piece)
                if rows[row].finish_reason:
                    running.remove(row)
            if not running:
                break
        return [row.generation(self.tokenizer) for row in rows]

    def _limits(self, encoded: list[list[int]], asked: int | None) -> list[int]:
        """Number of tokens to generate for each prompt, given as ids. Raises InputError if they do not fit into the window."""
        if asked is not None and asked < 1:
            raise InputError(f"max_new_tokens = {asked}; expected 1 or more.")
        lengths = [len(ids) for ids in encoded]
        longest, window = max(lengths), self.model.config.max_positions
        room, wanted = window - longest, asked or 1
        if room >= wanted:
            return [asked or min(DEFAULT_NEW_TOKENS, window - length) for length in lengths]
        which = f"prompt {1 + lengths.index(longest)} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
        raise InputError(
            f"{which} takes {longest:,} positions and max_new_tokens {wanted:,} more, but the model's window has {window:,}. "
            + (f"Set max_new_tokens to {room:,} or less, or shorten the prompt." if room > 0 else "Shorten the prompt.")
        )

    @torch.inference_mode()
    def _stream(
        self,
        encoded: list[list[int]],
        num_new: int,
        num_samples: int,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> Iterator[tuple[list[int], list[float]]]:
        """Yield the next token of every continuation and its log-probability, `num_new` times.

        A row that has ended goes on, so that the batch keeps its shape; it may run out of positions, and then stays at the last.
        """
        group, device = self.model.context.tensor, self.model.ln_f.weight.device
        longest, last_position = max(map(len, encoded)), self.model.config.max_positions - 1
        padding_B = torch.tensor([longest - len(ids) for ids in encoded])
        caches = make_caches(self.model, padding_B, longest + num_new - 1)  # the last token is not computed with
        pad_id = self.model.config.pad_id
        tokens_BS = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in encoded], device=device)
        position_ids_BS = (torch.arange(longest) - padding_B.unsqueeze(-1)).clamp(min=0).to(device)
        next_scores = self._next_scores(tokens_BS, position_ids_BS, caches)
        logits_BV, logprobs_BV = (x.repeat_interleave(num_samples, dim=0) for x in next_scores)
        if num_samples > 1:
            for cache in caches:
                cache.repeat(num_samples)
        next_position_B1 = position_ids_BS[:, -1:].repeat_interleave(num_samples, dim=0)
        penalties = None
        if sampling.has_penalties:
            penalties = Penalties(sampling, [ids for ids in encoded for _ in range(num_samples)], self.tokenizer.vocab_size, device)
        for left in reversed(range(num_new)):
            weighed_BV = penalties.apply(logits_BV) if penalties else logits_BV
            # The ranks' logits are equal; that their choices are must not hang on the last bit of a sum.
            chosen_B = broadcast(sample(weighed_BV, sampling, generators), group, source=0)
            if penalties:
                penalties.add(chosen_B)
            yield chosen_B.tolist(), logprobs_BV.gather(-1, chosen_B.unsqueeze(-1)).squeeze(-1).tolist()
            if left:
                next_position_B1 = (next_position_B1 + 1).clamp(max=last_position)
                logits_BV, logprobs_BV = self._next_scores(chosen_B.unsqueeze(-1), next_position_B1, caches)

    def _next_scores(self, tokens_BS: Tensor, position_ids_BS: Tensor, caches: Sequence[Cache]) -> tuple[Tensor, Tensor]:
        """Logits of the token after the last column, and log-probabilities in fp32: [B, V], V being the number of the tokenizer's ids.

        Equal on every rank.
        """
        last_B1H = self.model.hidden(tokens_BS, position_ids_BS, caches, last_only=True)
        logits_BV = gather_logits(
            self.model.wte.logits(last_B1H), vocab_size=self.tokenizer.vocab_size, group=self.model.context.tensor
        ).squeeze(1)
        logprobs_BV = logits_BV.log_softmax(dim=-1, dtype=torch.float32)
        if logprobs_BV[:, 0].isnan().any():  # one score that is not a number, or is infinite, leaves no other in its row
            raise InputError(
                f"the model's scores are not numbers (computed in {logits_BV.dtype}): the weights are damaged, or too large for this "
                "dtype. Convert them with tools/convert_checkpoint.py --dtype bf16 or fp32, or fetch them again."
            )
        return logits_BV, logprobs_BV
