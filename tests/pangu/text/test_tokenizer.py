"""The ids are those of the published tokenizer, and nothing a text says can forge a special one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from pangu.errors import InputError
from pangu.text.tokenizer import SPECIAL_PIECES, PanguTokenizer, TokenIdError


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> PanguTokenizer:
    return PanguTokenizer(shared / "tokenizer")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    """What the published tokenizer answered."""
    return json.loads((shared / "tokenizer" / "golden.json").read_text("utf-8"))


def test_every_golden_text_has_the_published_ids(tokenizer: PanguTokenizer, golden: dict) -> None:
    cases = golden["encode_cases"]
    assert len(cases) > 100
    for case in cases:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert [tokenizer.id_to_piece(token_id) for token_id in ids] == case["pieces"]
        assert tokenizer.decode(ids) == case["decoded"], case["text"]
        assert (tokenizer.decode(ids) == case["text"]) == case["round_trip"]


def test_every_golden_id_sequence_has_the_published_text(tokenizer: PanguTokenizer, golden: dict) -> None:
    for case in golden["decode_cases"]:
        if "error" in case:
            with pytest.raises(IndexError):
                tokenizer.decode(case["ids"])
        else:
            assert tokenizer.decode(case["ids"]) == case["decoded"], case["ids"]


def test_published_model(tokenizer: PanguTokenizer, shared: Path) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 40000
    assert tokenizer.sha256 == hashlib.sha256((shared / "tokenizer" / "vocab.model").read_bytes()).hexdigest()
    assert tokenizer.sha256[:12] in repr(tokenizer)
    named = (tokenizer.unk_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.eod_id, tokenizer.eot_id)
    assert named == (0, 5, 6, 7, 8, 9)
    assert PanguTokenizer(shared / "tokenizer" / "vocab.model").sha256 == tokenizer.sha256


def test_text_cannot_forge_a_special_id(tokenizer: PanguTokenizer) -> None:
    forged = "你好".join(SPECIAL_PIECES)
    assert not {1, 2, 5, 6, 7, 8, 9} & set(tokenizer.encode(forged))
    assert tokenizer.encode("<eot>") == [13, 1674, 2996, 9529, 716]


def test_special_pieces_become_ids_where_allowed(tokenizer: PanguTokenizer) -> None:
    hello, sep_as_text = tokenizer.encode("你好"), tokenizer.encode("<sep>你好")
    assert tokenizer.encode("你好<eot><sep>你好", allow_special=["<eot>"]) == [*hello, 9, *sep_as_text]
    assert tokenizer.encode("你好<eot><sep>你好", allow_special=True) == [*hello, 9, 5, *hello]
    assert tokenizer.encode("<eot>", allow_special="<eot>") == [9]
    assert tokenizer.encode("<eot>", allow_special=()) == tokenizer.encode("<eot>")
    assert tokenizer.decode([*hello, 9]) == "你好<eot>"
    with pytest.raises(InputError, match="allow_special: '<bos>' is not a special piece"):
        tokenizer.encode("你好", allow_special={"<bos>"})


@pytest.mark.parametrize("bad", [-1, 40000, 2**40])
def test_ids_outside_the_vocabulary(tokenizer: PanguTokenizer, bad: int) -> None:
    with pytest.raises(IndexError, match=rf"token id {bad} at position 1: .* has the ids 0 to 39999"):
        tokenizer.decode([9, bad])
    with pytest.raises(TokenIdError):
        tokenizer.id_to_piece(bad)


def test_ids_may_come_as_an_array_but_not_as_floats(tokenizer: PanguTokenizer) -> None:
    ids = [3826, 11, 21652, 16, 28]
    assert tokenizer.decode(np.array(ids, np.uint16)) == "四川的省会是?"
    with pytest.raises(TypeError):
        tokenizer.decode([3826.0])  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["四川的省会是\n\n成都 。", "  两个空格", "COVID-19 in 2020年3月", "a" * 300, "\n" * 100])
def test_round_trip(tokenizer: PanguTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogate_is_refused(tokenizer: PanguTokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+D83D at character 2"):
        tokenizer.encode("你好\ud83d")


def encode_in_worker(job: tuple[PanguTokenizer, str]) -> list[int]:
    tokenizer, text = job
    return tokenizer.encode(text)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_ids(tokenizer: PanguTokenizer, method: str) -> None:
    texts = ["四川的省会是?", "他来到了网易杭研大厦"]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(encode_in_worker, [(tokenizer, text) for text in texts]) == [tokenizer.encode(text) for text in texts]


def test_pickle_needs_no_file(tokenizer: PanguTokenizer, tmp_path: Path) -> None:
    saved = tokenizer.save(tmp_path)
    pickled = pickle.dumps(PanguTokenizer(saved))
    saved.unlink()
    restored = pickle.loads(pickled)
    assert restored.sha256 == tokenizer.sha256
    assert restored.encode("你好") == tokenizer.encode("你好")


def test_save_replaces_and_leaves_nothing_beside(tokenizer: PanguTokenizer, tmp_path: Path) -> None:
    target = tmp_path / "new" / "vocab.model"
    for _ in range(2):
        assert tokenizer.save(target.parent) == target
    assert list(target.parent.iterdir()) == [target]
    assert PanguTokenizer(target.parent).sha256 == tokenizer.sha256
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a directory that can be created"):
        tokenizer.save(tmp_path / "file")


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x00" * 100])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "vocab.model").write_bytes(content)
    with pytest.raises(InputError, match=r"vocab\.model") as refusal:
        PanguTokenizer(tmp_path)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_a_cut_off_model_is_refused(shared: Path, tmp_path: Path) -> None:
    model = (shared / "tokenizer" / "vocab.model").read_bytes()
    (tmp_path / "vocab.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(InputError, match="not a SentencePiece model"):
        PanguTokenizer(tmp_path)
