"""Chooses the next token from its logits: penalties, greedy, temperature, top-k and top-p.

Each row of a batch draws one number per token from its own generator, so a row's choice depends on its logits and its seed
alone, not on the other rows or the device.

Shapes: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pangu.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampling. The defaults sample from the model's own distribution.

    Raises:
        InputError: if a value is out of its range.
    """

    temperature: float = 1.0
    """Divisor of the logits: below 1 favours likely tokens. 0 is greedy: always the most likely token."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 1 is greedy, 0 means all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with at least this total probability (nucleus sampling, arXiv 1904.09751); 1:
    all."""
    repetition_penalty: float = 1.0
    """Factor by which logits of tokens in the prompt or the continuation are divided if positive, multiplied if negative
    (arXiv 1909.05858, section 4.1); 1 is none."""
    frequency_penalty: float = 0.0
    """Amount subtracted from a token's logit once per occurrence in the continuation; 0 is none."""
    presence_penalty: float = 0.0
    """Amount subtracted once from the logit of each token that occurs in the continuation; 0 is none."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(f"temperature = {self.temperature}; expected 0 (greedy) or more.")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}; expected 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p = {self.top_p}; expected more than 0 and at most 1 (all tokens).")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty = {self.repetition_penalty}; expected more than 0; 1 is none.")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} = {getattr(self, name)}; expected a finite number; 0 is none.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen; in fp32 this also holds for a temperature that is negligible beside a logit."""
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Whether a choice depends on the tokens before it."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Penalties:
    """The tokens so far and the penalties on their logits, which are applied before the temperature.

    Args:
        sampling: the strengths of the penalties.
        prompts: the ids of each row's prompt.
        vocab_size: V, the number of ids that can be chosen.
        device: device of the logits.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self.count_BV = torch.zeros(len(prompts), vocab_size, device=device)
        self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompts):
            self.seen_BV[row, torch.tensor(ids, device=device)] = True

    def add(self, ids_B: Tensor) -> None:
        """Count the token that was chosen for each row: ids_B, int64."""
        ids_B1 = ids_B.unsqueeze(-1)
        self.count_BV.scatter_add_(1, ids_B1, torch.ones_like(ids_B1, dtype=torch.float32))
        self.seen_BV.scatter_(1, ids_B1, True)

    def apply(self, logits_BV: Tensor) -> Tensor:
        """The logits with penalties applied, [B, V], fp32."""
        logits_BV, repetition = logits_BV.float(), self.sampling.repetition_penalty
        repeated_BV = torch.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
        logits_BV = torch.where(self.seen_BV, repeated_BV, logits_BV)
        return logits_BV - self.sampling.frequency_penalty * self.count_BV - self.sampling.presence_penalty * (self.count_BV > 0)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidate tokens, most likely first; among equally likely ones the lower id first.

    Temperature comes first, then top-k, then top-p of what top-k left.

    Returns:
        weights_BC, fp32, in the ratio of the probabilities and 0 for what top-p excludes; ids_BC, int64. Greedy: C = 1.
    """
    if sampling.is_greedy:
        ids_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.ones_like(ids_B1, dtype=torch.float32), ids_B1
    sorted_BV, ids_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    # The largest becomes 0 before the division, which may then overflow only towards probability 0.
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / sampling.temperature
    num_candidates = sampling.top_k or scaled_BV.shape[-1]
    weights_BC = scaled_BV[:, :num_candidates].softmax(dim=-1)
    if sampling.top_p < 1.0:
        mass_before_BC = weights_BC.cumsum(dim=-1) - weights_BC
        weights_BC = weights_BC.masked_fill(mass_before_BC >= sampling.top_p, 0.0)
    return weights_BC, ids_BV[:, :num_candidates]


def sample(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose one token a row.

    Args:
        logits_BV: of the real vocabulary, without padded ids; any float dtype.
        sampling: how.
        generators: one per row, on the CPU; each is advanced by one number, even if greedy.

    Returns:
        ids_B, int64, each in [0, V).
    """
    weights_BC, ids_BC = candidates(logits_BV, sampling)
    drawn_B = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(weights_BC.device)
    mass_BC = weights_BC.cumsum(dim=-1)
    chosen_B1 = torch.searchsorted(mass_BC, drawn_B.unsqueeze(-1) * mass_BC[:, -1:], right=True)
    # Devices sum in an order of their own, and their rounding may lift a draw next to 1 past the last candidate of any weight.
    last_B1 = (weights_BC > 0).sum(dim=-1, keepdim=True) - 1
    return ids_BC.gather(-1, chosen_B1.minimum(last_B1)).squeeze(-1)
