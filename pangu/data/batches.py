"""Turns samples into the tensors that the model is trained on; a thread reads them ahead.

Shapes: b micro-batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext import accelerator
from pangu.data.blending import BlendedDataset
from pangu.data.lookahead import ordered_map
from pangu.data.packing import PackedDataset
from pangu.data.sampler import Sampler

# What the thread is given at a time: small micro-batches together, or handing them over would take longer than reading them.
SAMPLES_AT_ONCE = 8
# Enough that the thread is never waited for, little enough that stopping costs nothing.
GROUPS_AHEAD = 4


class Batch(NamedTuple):
    """One micro-batch, its fields in the order of the model's arguments. There is no attention mask: the model finds the documents by the
    zeros of `position_ids`.
    """

    tokens: Tensor
    """int64[b, s], the input."""
    position_ids: Tensor
    """int64[b, s], 0 at the first token of each document and only there."""
    labels: Tensor
    """int64[b, s], at each position the id of the next token."""
    loss_mask: Tensor
    """float32[b, s], 0 where the input is padding."""


def collate(samples: NDArray[np.int64], *, separator_id: int, pad_id: int, eod_reset: bool) -> Batch:
    """Turn samples int64[b, s + 1] into a Batch, by the rules of PanGu-α's released training code.

    A separator belongs to the document it ends and is trained on: it predicts the first token of the next. The loss is masked where the
    *input* is padding, so the padding label after the last token counts.

    Args:
        samples: int64[b, s + 1].
        separator_id: id that ends a document (`<eot>`, 9, in the released models).
        pad_id: id of padding (6).
        eod_reset: positions begin again at 0 after each separator; otherwise a sample is one document, with positions 0 to s - 1.
    """
    tokens = samples[:, :-1]
    place = np.arange(tokens.shape[1])
    position_ids = np.broadcast_to(place, tokens.shape)
    if eod_reset:
        first_of_document = np.zeros(tokens.shape, bool)
        first_of_document[:, 1:] = tokens[:, :-1] == separator_id
        position_ids = place - np.maximum.accumulate(np.where(first_of_document, place, 0), axis=1)
    return Batch(
        tokens=torch.from_numpy(tokens.copy()),
        position_ids=torch.from_numpy(position_ids.astype(np.int64, order="C")),  # pipeline stages send nothing that is not contiguous
        labels=torch.from_numpy(samples[:, 1:].copy()),
        loss_mask=torch.from_numpy((tokens != pad_id).astype(np.float32)),
    )


def micro_batches(
    dataset: BlendedDataset | PackedDataset,
    sampler: Sampler,
    consumed_samples: int,
    *,
    separator_id: int,
    pad_id: int,
    eod_reset: bool,
) -> Generator[Batch, None, None]:
    """An endless iterator over this rank's micro-batches, from the point where the run has consumed `consumed_samples`.

    A thread reads ahead, into page-locked memory if there is a device. An error in it is raised here, up to SAMPLES_AT_ONCE samples early;
    `close()` on the generator ends the thread. No random numbers are drawn: the state of torch's generators does not change.
    """

    def load(group: list[range]) -> list[Batch]:
        samples = np.stack([dataset[index] for indices in group for index in indices])
        whole = collate(samples, separator_id=separator_id, pad_id=pad_id, eod_reset=eod_reset)
        parts = zip(*(accelerator.pin(tensor).split(sampler.micro_batch_size) for tensor in whole), strict=True)
        return [Batch(*part) for part in parts]

    ranges = sampler.micro_batches(consumed_samples)
    in_group = max(1, SAMPLES_AT_ONCE // sampler.micro_batch_size)
    groups = iter(lambda: list(islice(ranges, in_group)), [])
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="micro_batches")
    try:
        for group in ordered_map(executor, load, groups, GROUPS_AHEAD):
            yield from group
    finally:
        executor.shutdown(cancel_futures=True)
