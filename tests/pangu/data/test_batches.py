"""Batches against the original code's, and the iterator that training resumes from."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pangu.data.batches import Batch, collate, micro_batches
from pangu.data.sampler import Sampler

RULES: dict[str, Any] = {"separator_id": 9, "pad_id": 6, "eod_reset": True}


class Numbered:
    """Stands for a data set: sample i is i, i+1, ..., with a separator now and then."""

    def __getitem__(self, index: int) -> np.ndarray:
        if index == 40:
            raise OSError("the disk is gone")
        sample = np.arange(index, index + 17)
        sample[index % 5 :: 6] = 9
        return sample


def batches(consumed: int, count: int, **layout: int) -> list[Batch]:
    dataset: Any = Numbered()
    iterator = micro_batches(dataset, Sampler(**{"global_batch_size": 8, "micro_batch_size": 2, **layout}), consumed, **RULES)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_collate_gives_the_original_codes_batch(shared: Path) -> None:
    golden = np.load(shared / "oracle" / "A" / "case_eod.npz")
    batch = collate(golden["input_ids"].astype(np.int64), **RULES)
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), golden[name], err_msg=name)
    # The model's rule for documents gives the original's attention mask.
    segment = (batch.position_ids == 0).cumsum(1)
    visible = torch.ones(32, 32).tril() * (segment[:, :, None] == segment[:, None, :])
    np.testing.assert_array_equal(visible.numpy(), golden["attention_mask"])


def test_collate_written_out() -> None:
    batch = collate(np.array([[9, 9, 5, 6, 9, 7], [1, 2, 3, 4, 9, 9]]), **RULES)
    assert batch.tokens.tolist() == [[9, 9, 5, 6, 9], [1, 2, 3, 4, 9]]
    assert batch.labels.tolist() == [[9, 5, 6, 9, 7], [2, 3, 4, 9, 9]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert [tensor.dtype for tensor in batch] == [torch.int64, torch.int64, torch.int64, torch.float32]
    assert all(tensor.is_contiguous() for tensor in batch)


def test_without_reset_a_sample_is_one_document() -> None:
    batch = collate(np.array([[9, 9, 5, 6, 9, 7]] * 2), separator_id=9, pad_id=6, eod_reset=False)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert all(tensor.is_contiguous() for tensor in batch)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_resume_reads_what_was_left(steps: int) -> None:
    assert equal(batches(8 * steps, 4), batches(0, 4 * steps + 4)[4 * steps :])


def test_ranks_read_parts_of_the_same_global_batch() -> None:
    alone = batches(8, 4)
    split = [batch for rank in (0, 1) for batch in batches(8, 2, data_parallel_size=2, data_parallel_rank=rank)]
    assert equal(alone, split)


def test_torchs_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches(0, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_an_exception_in_the_thread_is_raised_here_in_its_place() -> None:
    assert len(batches(32, 4)) == 4
    with pytest.raises(OSError, match="the disk is gone"):
        batches(32, 5)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    batches(0, 3)
    assert threading.active_count() == before
