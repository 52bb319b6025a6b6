"""Generated text: equal to recomputing everything for each token, independent of the batch, and refusals that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.small_model import TOKENIZER_VOCAB, VOCAB, WINDOW, NumberTokenizer, small_model

from megatron_ext.supervision import rendezvous
from megatron_ext.topology import SINGLE, Group, Groups, Topology
from pangu.errors import InputError
from pangu.inference.generation import Generation, TextGenerator
from pangu.model.model import PanguModel

SEPARATOR = 9
NUMBERS = torch.randint(10, TOKENIZER_VOCAB, (WINDOW,), generator=torch.Generator().manual_seed(5)).tolist()


def generator(group: Group = SINGLE, **changes: Any) -> TextGenerator:
    return TextGenerator(small_model(group, **changes), NumberTokenizer())  # type: ignore[arg-type]


def prompt(length: int, first: int = 0) -> str:
    return " ".join(map(str, NUMBERS[first : first + length]))


def greedy_to_the_window(of: TextGenerator) -> list[list[int]]:
    """The continuation of a prompt of every length, each in a batch of its own, until the window is full."""
    return [of.generate([prompt(length)], max_new_tokens=WINDOW - length, temperature=0, stop_ids=())[0].ids for length in range(1, WINDOW)]


@torch.inference_mode()
def recomputed(model: PanguModel, ids: list[int], num_new: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(ids)
    for _ in range(num_new):
        logits = model.logits(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0, -1, :TOKENIZER_VOCAB]
        ids.append(int(logits.argmax()))
    return ids[-num_new:]


@pytest.mark.parametrize("final_norm", ["before_query", "after_query"])
def test_greedy_equals_recomputation_for_every_prompt_length(final_norm: str) -> None:
    of = generator(final_norm=final_norm)
    generated = greedy_to_the_window(of)
    for length, ids in enumerate(generated, start=1):
        assert ids == recomputed(of.model, NUMBERS[:length], WINDOW - length)
    assert len({token for ids in generated for token in ids}) > 20  # not one token for ever


OPTIONS: dict[str, Any] = {"num_samples": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.5, "top_p": 0.9, "stop": ["77"]}


def rank_generations() -> tuple[list[list[int]], list[Generation], list[Generation]]:
    rendezvous.initialize(60)
    group = Groups.create(Topology(tensor=2, pipeline=1, data=1)).tensor
    of = generator(group)
    disagreeing = of.generate([prompt(3)], max_new_tokens=12, seed=group.rank, **OPTIONS)
    return greedy_to_the_window(of), of.generate([prompt(3), prompt(8)], max_new_tokens=12), disagreeing


def test_two_ranks_generate_what_one_does_even_where_their_draws_differ() -> None:
    of = generator()
    expected = (
        greedy_to_the_window(of),
        of.generate([prompt(3), prompt(8)], max_new_tokens=12),
        of.generate([prompt(3)], max_new_tokens=12, seed=0, **OPTIONS),
    )
    assert run_distributed(rank_generations, 2) == [expected, expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_does_not_change_a_continuation(temperature: float) -> None:
    of = generator()
    prompts = [prompt(1), prompt(12), prompt(5, first=4), "", prompt(7)]
    alone = [of.generate([text], max_new_tokens=12, temperature=temperature)[0] for text in prompts]
    assert of.generate(prompts, max_new_tokens=12, temperature=temperature) == alone
    assert of.generate(prompts[::-1], max_new_tokens=12, temperature=temperature) == alone[::-1]
    assert len({generation.text for generation in alone}) == len(prompts)


def test_the_seed_decides_the_text() -> None:
    of = generator()
    texts = [of.generate([prompt(4)], max_new_tokens=12, seed=seed)[0].text for seed in (7, 7, 8, 2**70)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert [generation.text for generation in of.generate([prompt(4)] * 2, max_new_tokens=12, seed=[7, 8])] == texts[1:3]


def test_text_is_the_new_tokens_alone() -> None:
    [generation] = generator().generate([prompt(4)], max_new_tokens=5, stop_ids=())
    assert len(generation.ids) == 5
    assert generation == Generation(" ".join(map(str, generation.ids)), generation.ids, "length")


def test_a_stop_token_ends_its_row_alone_and_is_left_out() -> None:
    of = generator()
    prompts = [prompt(3), prompt(6)]
    whole = [generation.ids for generation in of.generate(prompts, max_new_tokens=15, temperature=3.0, stop_ids=())]
    for stop in {*whole[0], *whole[1]}:
        generations = of.generate(prompts, max_new_tokens=15, temperature=3.0, stop_ids=[stop])
        for ids, generation in zip(whole, generations, strict=True):
            assert generation.ids == (ids[: ids.index(stop)] if stop in ids else ids)
            assert generation.finish_reason == ("stop" if stop in ids else "length")
    assert {*whole[0]} ^ {*whole[1]}  # some tokens stop one row alone


def test_the_separator_stops_by_default() -> None:
    of = generator()
    with torch.no_grad():
        of.model.wte.weight[SEPARATOR] *= 100.0  # its logit outweighs the others wherever it is positive
    generations = of.generate([prompt(n) for n in range(1, 9)], max_new_tokens=15, temperature=0)
    assert "stop" in {generation.finish_reason for generation in generations}
    assert all(SEPARATOR not in generation.ids for generation in generations)


def test_all_rows_stopped_end_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    of = generator()
    lengths = []
    hidden = of.model.hidden
    monkeypatch.setattr(
        of.model, "hidden", lambda tokens, *rest, **options: lengths.append(tokens.shape[1]) or hidden(tokens, *rest, **options)
    )
    [generation] = of.generate([prompt(4)], max_new_tokens=15, stop_ids=range(VOCAB))
    assert generation == Generation("", [], "stop")
    of.generate([prompt(4)], max_new_tokens=3, stop_ids=())
    assert lengths == [4, 4, 1, 1]


def test_only_ids_of_the_tokenizer_are_generated() -> None:
    of = generator()
    generations = of.generate([prompt(1)] * 40, max_new_tokens=20, temperature=50.0, seed=range(40))
    ids = [token for generation in generations for token in generation.ids]
    assert len(ids) > 500
    assert max(ids) == TOKENIZER_VOCAB - 1


def test_an_empty_prompt_continues_the_separator() -> None:
    of = generator()
    assert of.generate([""], max_new_tokens=5) == of.generate([str(SEPARATOR)], max_new_tokens=5)
    assert of.generate([]) == []


def test_without_a_number_the_window_is_filled_but_not_exceeded() -> None:
    assert len(generator().generate([prompt(4)], stop_ids=())[0].ids) == WINDOW - 4
    assert len(generator(max_positions=200).generate([prompt(4)], stop_ids=())[0].ids) == 100


def test_samples_are_what_their_seeds_give_one_by_one() -> None:
    of = generator()
    prompts = [prompt(4), prompt(9)]
    samples = of.generate(prompts, max_new_tokens=10, num_samples=3, seed=[5, 50])
    singly = [
        of.generate([text], max_new_tokens=10, seed=seed + j)[0] for text, seed in zip(prompts, [5, 50], strict=True) for j in range(3)
    ]
    assert samples == singly
    assert len({sample.text for sample in samples}) == 6


@pytest.mark.parametrize("top_k", [0, 5])
def test_log_probabilities_are_the_model_s_own(top_k: int) -> None:
    of = generator()
    [one] = of.generate([prompt(4)], max_new_tokens=10, temperature=0.7, top_k=top_k, frequency_penalty=1.0, stop_ids=())
    ids = NUMBERS[:4] + one.ids
    with torch.inference_mode():
        logits = of.model.logits(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0, 3:-1, :TOKENIZER_VOCAB]
    expected = logits.log_softmax(dim=-1)[torch.arange(10), torch.tensor(one.ids)]
    assert one.logprobs == pytest.approx(expected.tolist(), abs=5e-5)


def test_penalties_forbid_repetition() -> None:
    of = generator()
    [one] = of.generate([prompt(3)], max_new_tokens=20, temperature=2.0, presence_penalty=1e9, stop_ids=())
    assert len(set(one.ids)) == 20
    [other] = of.generate([prompt(3)], max_new_tokens=20, temperature=0, repetition_penalty=1e-9, stop_ids=())
    assert set(other.ids) & set(NUMBERS[:3])  # below 1 it favours what was said


def test_a_stop_string_ends_the_text_before_it() -> None:
    of = generator()
    [whole] = of.generate([prompt(4)], max_new_tokens=12, seed=3, stop_ids=())
    words = whole.text.split()
    stop = f"{words[5]} {words[6]}"
    [stopped] = of.generate([prompt(4)], max_new_tokens=12, seed=3, stop=[stop], stop_ids=())
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.ids, stopped.finish_reason) == (whole.ids[:7], "stop")


def test_streamed_pieces_make_the_texts() -> None:
    of = generator()
    prompts = [prompt(2), prompt(6)]
    pieces: dict[int, list[str]] = {row: [] for row in range(4)}
    options: dict[str, Any] = {"max_new_tokens": 12, "num_samples": 2, "stop": ["7 ", "3"]}
    generations = of.generate(prompts, on_text=lambda row, piece: pieces[row].append(piece), **options)
    assert ["".join(pieces[row]) for row in range(4)] == [generation.text for generation in generations]
    assert generations == of.generate(prompts, **options)
    assert max(map(len, pieces.values())) > 3 and all(all(row) for row in pieces.values())


def test_a_prompt_that_is_too_long_is_cut_on_the_left_if_asked() -> None:
    of = generator()
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0, "stop_ids": ()}
    long = " ".join(map(str, NUMBERS + NUMBERS))
    [expected] = of.generate([" ".join(map(str, NUMBERS[-(WINDOW - 5) :]))], **options)
    short = of.generate([prompt(3)], **options)
    assert of.generate([long, prompt(3)], truncate_prompts=True, **options) == [expected, *short]
    with pytest.raises(InputError, match="max_new_tokens 24 more"):
        of.generate([long], max_new_tokens=WINDOW, truncate_prompts=True)


def test_a_short_prompt_is_not_cut_short_by_a_long_one() -> None:
    of = generator(max_positions=120)
    assert [len(one.ids) for one in of.generate([prompt(24), prompt(2)], stop_ids=())] == [96, 100]


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    [
        ([prompt(20)], {"max_new_tokens": 5}, "the prompt takes 20 positions and .* 5 more, .* has 24. Set max_new_tokens to 4 or less"),
        ([prompt(2), prompt(20)], {"max_new_tokens": 5}, "prompt 2 of 2 takes 20 positions"),
        ([prompt(WINDOW)], {"max_new_tokens": 1}, "has 24. Shorten the prompt"),
        ([prompt(WINDOW)], {}, "has 24. Shorten the prompt"),
        ([prompt(2)], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([prompt(2)], {"seed": -1}, "seed = -1"),
        ([prompt(2)], {"seed": [1, 2]}, "expected one number of 0 or more, or 1 of them"),
        ([prompt(2)], {"top_p": 2.0}, "top_p = 2.0"),
        ([prompt(2)], {"num_samples": 0}, "num_samples = 0"),
        ([prompt(2)], {"stop": [""]}, "stop = '': nothing is left"),
    ],
)
def test_refusals(prompts: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generator().generate(prompts, **values)


def test_a_tokenizer_with_more_ids_is_refused() -> None:
    with pytest.raises(InputError, match="numbers has 90 ids, but the model only 80"):
        generator(vocab_size=80)


def test_scores_that_are_not_numbers_are_refused() -> None:
    of = generator()
    with torch.no_grad():
        of.model.ln_f.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"not numbers \(computed in torch.float32\)"):
        of.generate([prompt(2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sixteen_bits(dtype: torch.dtype, attention: str) -> None:
    of = generator(attention=attention)
    expected = of.generate([prompt(12)], max_new_tokens=2, temperature=0, stop_ids=())
    of.model.to(dtype)
    assert of.generate([prompt(12)], max_new_tokens=2, temperature=0, stop_ids=()) == expected
