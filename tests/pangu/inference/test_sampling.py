"""Next-token choice: the distributions are exact, a row depends on its own generator alone, and nothing outside can be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pangu.errors import InputError
from pangu.inference.sampling import Penalties, Sampling, candidates, sample

PROBABILITIES = [0.15, 0.5, 0.1, 0.25]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def logits(probabilities: Sequence[float] = PROBABILITIES) -> Tensor:
    return torch.tensor([probabilities]).log() + 3.0  # logits are known up to a constant


def distribution(sampling: Sampling) -> list[float]:
    """The probability of each id by `candidates`."""
    weights, ids = candidates(logits(), sampling)
    return torch.zeros(1, len(PROBABILITIES)).scatter(-1, ids, weights / weights.sum())[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
        (Sampling(top_k=9), PROBABILITIES),
        (Sampling(temperature=0.5), [p * p / 0.345 for p in PROBABILITIES]),
        (Sampling(top_p=0.4), [0, 1, 0, 0]),  # the first alone has more
        (Sampling(top_p=0.7), [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
        (Sampling(top_p=0.76), [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        (Sampling(top_p=0.99), PROBABILITIES),
        (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # of what top-k left, the first has 2/3
        (Sampling(temperature=0.5, top_p=0.7), [0, 1, 0, 0]),  # after the temperature the first has 0.72
    ],
)
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    assert distribution(sampling) == pytest.approx(expected, abs=1e-6)


def test_top_p_keeps_the_token_that_reaches_the_mass_exactly() -> None:
    weights, _ = candidates(torch.zeros(1, 4), Sampling(top_p=0.5))
    assert (weights > 0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=3), Sampling(temperature=1.5, top_p=0.8)])
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    num_draws = 20_000
    drawn = torch.cat([sample(logits().expand(200, -1), sampling, [generator] * 200) for generator in generators(range(num_draws // 200))])
    counts = torch.bincount(drawn, minlength=4).tolist()
    expected = [probability * num_draws for probability in distribution(sampling)]
    assert all(count == 0 for count, mean in zip(counts, expected, strict=True) if mean == 0)
    chi_squared = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True) if mean)
    assert chi_squared < 16.27  # 0.1 % of correct samplers would exceed it, with three degrees of freedom; the seeds are fixed


def test_first_draws_of_consecutive_seeds_are_spread_too() -> None:
    counts = torch.bincount(sample(logits().expand(4000, -1), Sampling(), generators(range(4000))), minlength=4)
    assert (counts / 4000).tolist() == pytest.approx(PROBABILITIES, abs=0.03)


def test_a_row_depends_on_its_logits_and_generator_alone() -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95)
    together = sample(rows, sampling, generators(range(6))).tolist()
    alone = [sample(rows[i : i + 1], sampling, generators([i])).item() for i in range(6)]
    backwards = sample(rows.flip(0), sampling, generators(range(5, -1, -1))).flip(0).tolist()
    assert together == alone == backwards
    assert len(set(together)) > 1


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24, 1.0])  # the last stands for a sum that rounding made too small
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.6), Sampling(top_k=2)])
def test_the_ends_of_a_draw_stay_inside_the_candidates(monkeypatch: pytest.MonkeyPatch, sampling: Sampling, draw: float) -> None:
    row = logits().repeat(1, 3000) / 2
    row[:, -1] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, draw))
    [chosen] = sample(row, sampling, generators([0])).tolist()
    weights, ids = candidates(row, sampling)
    possible = ids[weights > 0].tolist()
    assert chosen == possible[0 if draw == 0 else -1]


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.5, 0.75])
def test_a_token_owns_the_draws_from_its_lower_end_on(monkeypatch: pytest.MonkeyPatch, draw: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, draw))
    assert sample(torch.zeros(1, 4), Sampling(), generators([0])).tolist() == [int(draw * 4)]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e30])
def test_extreme_values_draw_a_token(temperature: float) -> None:
    row = torch.tensor([[1e30, -1e30, -math.inf, 0.0]])
    [chosen] = sample(row, Sampling(temperature=temperature), generators([0])).tolist()
    assert chosen == 0 if temperature < 1 else chosen != 2


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert sample(torch.tensor([[1.0, 2.0, 2.0]]), Sampling(temperature=0.0), generators([0])).tolist() == [1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # The prompt is 0 0 3, then 1 2 1 are drawn; the logits before are 2, -1, 0.5, -4, 1.
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 0.25, -8.0, 1.0]),
        ({"frequency_penalty": 0.25}, [2.0, -1.5, 0.25, -4.0, 1.0]),
        ({"presence_penalty": 0.25}, [2.0, -1.25, 0.25, -4.0, 1.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": -0.5}, [1.0, -3.5, -0.25, -8.0, 1.0]),
    ],
)
def test_penalties(values: dict[str, float], expected: list[float]) -> None:
    penalties = Penalties(Sampling(**values), [[0, 0, 3], [4]], 5, torch.device("cpu"))
    for token in (1, 2, 1):
        penalties.add(torch.tensor([token, 0]))
    logits_BV = torch.tensor([[2.0, -1.0, 0.5, -4.0, 1.0]]).expand(2, -1)
    first, second = penalties.apply(logits_BV)
    assert first.tolist() == expected
    assert second[1] == -1.0 and second[2] == 0.5  # the other row's tokens are its own


def test_only_values_that_change_something_are_penalties() -> None:
    assert not Sampling(temperature=0.5, top_k=3, top_p=0.5).has_penalties
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert Sampling(**{name: 0.5}).has_penalties


def test_a_token_without_probability_stays_without() -> None:
    penalties = Penalties(Sampling(repetition_penalty=0.5, frequency_penalty=-3.0), [[0]], 2, torch.device("cpu"))
    penalties.add(torch.tensor([0]))
    assert penalties.apply(torch.tensor([[-math.inf, 0.0]])).tolist() == [[-math.inf, 0.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty = nan"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**values)
