"""The tokenizer that travels with the weights: the published ids and texts, special tokens, copies of it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(golden, trust_remote_code=True)


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "tokenizer" / "golden.json").read_text("utf-8"))


def test_every_golden_text_has_the_published_ids(tokenizer: Any, published: dict[str, Any]) -> None:
    assert len(published["encode_cases"]) > 100
    for case in published["encode_cases"]:
        assert tokenizer(case["text"]).input_ids == case["ids"], case["text"]
        assert tokenizer.tokenize(case["text"]) == case["pieces"] or 0 in case["ids"]  # an unknown piece keeps its text
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_every_golden_id_sequence_has_the_published_text(tokenizer: Any, published: dict[str, Any]) -> None:
    for case in published["decode_cases"]:
        if "error" in case:
            with pytest.raises(IndexError):
                tokenizer.decode(case["ids"])
        else:
            assert tokenizer.decode(case["ids"]) == case["decoded"], case["ids"]


def test_the_tokenizer_knows_its_model(tokenizer: Any, golden: Path) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 40000 and tokenizer.model_max_length == 32
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 6, 9, 9)
    config = transformers.AutoConfig.from_pretrained(golden, trust_remote_code=True)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (6, 9, 9)
    batch = tokenizer(["四川的省会是?", "你好"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[3826, 11, 21652, 16, 28], [6, 6, 6, 6, 5772]]
    assert batch.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_text_ends_no_document_unless_it_may(tokenizer: Any, golden: Path) -> None:
    assert 9 not in tokenizer("你好<eot>").input_ids
    assert tokenizer("你好<eot>", split_special_tokens=False).input_ids[-1] == 9
    opened = transformers.AutoTokenizer.from_pretrained(golden, trust_remote_code=True, split_special_tokens=False)
    opened.add_tokens(["<我的>"])
    ids = opened("你好<eot><我的>你好").input_ids
    assert ids == [*tokenizer("你好").input_ids, 9, 40000, *tokenizer("你好").input_ids]
    assert opened.decode(ids) == "你好<eot><我的>你好"
    assert opened.decode(ids, skip_special_tokens=True) == "你好<我的>你好"


def test_the_tokenizer_travels(tokenizer: Any, tmp_path: Path) -> None:
    text = "今天是一个好天气\n  1 2"
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other(text).input_ids == tokenizer(text).input_ids and len(other) == 40000
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again(text).input_ids == tokenizer(text).input_ids and again.padding_side == "left"
    assert again("<eot>").input_ids == tokenizer("<eot>").input_ids
    assert (tmp_path / "vocab.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()


def test_weights_without_a_tokenizer_say_so(small: Path) -> None:
    with pytest.raises(ValueError, match=r"Copy PanGu-α's vocab\.model"):
        transformers.AutoTokenizer.from_pretrained(small, trust_remote_code=True)
