"""The two streams: which ranks share them, that they do not disturb each other, and that they can be saved."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from megatron_ext.random import RngStreams, derive_seed
from megatron_ext.topology import Coordinates

PLACES = [Coordinates(*place) for place in product(range(2), range(3), range(4))]


def draws(seed: int, place: Coordinates) -> tuple[list[float], list[float]]:
    """The first numbers of the default stream and of the tensor-parallel stream of a rank."""
    streams = RngStreams(seed, place)
    default = torch.rand(4).tolist()
    with streams.tensor_parallel():
        return default, torch.rand(4).tolist()


def test_who_shares_a_stream() -> None:
    found = {place: draws(5, place) for place in PLACES}
    for a, b in product(PLACES, PLACES):
        # Default: alike on all tensor-parallel ranks, for they drop the same activations; different anywhere else.
        assert (found[a][0] == found[b][0]) == ((a.pipe, a.data) == (b.pipe, b.data)), (a, b)
        assert (found[a][1] == found[b][1]) == (a == b), (a, b)
        assert found[a][0] != found[b][1], (a, b)


def test_another_seed_is_another_pair_of_streams() -> None:
    place = Coordinates(0, 0, 0)
    (a, b), (c, d) = draws(5, place), draws(6, place)
    assert a != c and b != d
    assert draws(5, place) == (a, b)


def test_derived_seeds_depend_on_every_word_and_on_their_order() -> None:
    seeds = [derive_seed(*words) for words in permutations((0, 1, 2, 3))]
    seeds += [derive_seed(1, 1, 1, 1), derive_seed(1, 2, 3, 0, 1), derive_seed(2**40, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_streams_do_not_disturb_each_other() -> None:
    place = Coordinates(1, 1, 1)
    default, parallel = draws(5, place)
    streams = RngStreams(5, place)
    mixed_default, mixed_parallel = [], []
    for _ in range(4):
        mixed_default.append(torch.rand(1).item())
        with streams.tensor_parallel():
            mixed_parallel.append(torch.rand(1).item())
    assert mixed_default == default
    assert mixed_parallel == parallel


def test_an_error_inside_the_block_leaves_the_default_stream_in_place() -> None:
    streams = RngStreams(5, Coordinates(0, 0, 0))
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), streams.tensor_parallel():
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_streams_go_on_where_they_were() -> None:
    streams = RngStreams(5, Coordinates(0, 1, 0))

    def numbers() -> tuple[list[float], list[float]]:
        default = torch.rand(3).tolist()
        with streams.tensor_parallel():
            return default, torch.rand(3).tolist()

    numbers()
    state = streams.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    expected = [numbers(), numbers()]
    assert all(torch.equal(state[name], kept[name]) for name in kept)  # drawing on does not write into what was saved
    streams = RngStreams(99, Coordinates(3, 3, 3))
    streams.load_state_dict(state)
    assert [numbers(), numbers()] == expected


def test_replay_repeats_the_stream_and_leaves_it_as_it_was() -> None:
    streams = RngStreams(5, Coordinates(0, 0, 0))

    def number() -> float:
        with streams.tensor_parallel():
            return torch.rand(1).item()

    snapshot = streams.tensor_parallel_state
    first, second = number(), number()
    with streams.replay(snapshot):
        assert number() == first
    third = number()  # not `second` again
    again = RngStreams(5, Coordinates(0, 0, 0))
    with again.tensor_parallel():
        assert torch.rand(3).tolist() == pytest.approx([first, second, third], abs=0)


def test_dropout_of_a_whole_tensor_is_alike_on_the_ranks_and_of_a_part_is_not() -> None:
    x = torch.ones(1000)
    dropped = {}
    for split, tensor in product((False, True), range(2)):
        streams = RngStreams(5, Coordinates(0, 0, tensor))
        dropped[split, tensor] = streams.dropout(x, 0.25, training=True, split=split)
    assert torch.equal(dropped[False, 0], dropped[False, 1])
    assert not torch.equal(dropped[True, 0], dropped[True, 1])
    for y in dropped.values():
        assert set(y.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((y == 0).double().mean() - 0.25) < 0.06


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
@pytest.mark.parametrize("split", [False, True])
def test_dropout_that_drops_nothing_draws_nothing(p: float, training: bool, split: bool) -> None:
    streams = RngStreams(5, Coordinates(0, 0, 0))
    default, parallel = torch.get_rng_state(), streams.tensor_parallel_state
    x = torch.ones(10)
    assert streams.dropout(x, p, training=training, split=split) is x
    assert torch.equal(torch.get_rng_state(), default)
    assert torch.equal(streams.tensor_parallel_state, parallel)
