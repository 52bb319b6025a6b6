"""The segments are jieba's own, whoever computes them and whatever the rest of the process did to jieba."""

from __future__ import annotations

import marshal
import pickle
import random
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import jieba
import pytest
import rjieba
from jieba import finalseg

from pangu.text.segmentation import VERIFIED_RJIEBA, Segmenter

PROSE = "迈向充满希望的新世纪，2020年3月，他来到了网易杭研大厦。T恤衫3.5元，COVID-19；www.example.com\r\n 小S的C++\t叠加入时"


@pytest.fixture(scope="module")
def reference() -> jieba.Tokenizer:
    """jieba 0.42.1 as it is; only its cache file is gone around."""
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter()


@pytest.fixture(scope="module")
def without_rjieba() -> Segmenter:
    return Segmenter(use_rjieba=False)


def fuzz(words: list[str], seed: int, count: int) -> list[str]:
    """Texts of dictionary words, parts of them, rare characters, Latin runs and everything that could end a block."""
    draw = random.Random(seed)
    mixed = [word for word in words if re.search("[!-~]", word)]
    kinds = [
        lambda: draw.choice(words),
        lambda: draw.choice(words)[: draw.randint(1, 2)],
        lambda: chr(draw.randint(0x4E00, 0x9FFF)),
        lambda: draw.choice("\u4dff\u4e00\u9fd5\u9fd6\u9fff\u3400\uf900\U00020bb7〇々"),
        lambda: draw.choice(mixed),
        lambda: "".join(draw.choices("abXYTQC0123456789.+-_%#&", k=draw.randint(1, 6))),
        lambda: draw.choice("，。！？ \n\r\t\0\"'（…—\u3000\x85\u2028\x1c▂▃▁<>/@^"),
        lambda: draw.choice(["\r\n", "\n\n", "<eot>", "α", "é", "の", "😀", "１", "²", "٣"]),
    ]
    weights = [40, 10, 15, 3, 5, 10, 15, 2]
    return ["".join(make() for make in draw.choices(kinds, weights, k=draw.randint(1, 40))) for _ in range(count)]


def test_segments_equal_jieba_on_random_text(segmenter: Segmenter, reference: jieba.Tokenizer) -> None:
    words = [word for word, frequency in reference.FREQ.items() if frequency]
    different = [text for text in fuzz(words, seed=0, count=2500) if segmenter.cut(text) != reference.lcut(text)]
    assert different == []


def test_segments_equal_jieba_on_runs_of_rare_characters(segmenter: Segmenter, reference: jieba.Tokenizer) -> None:
    # Unknown to dictionary and HMM alike: whole paths tie at -3.14e100, and only the rule for ties decides. Longer than the memo too.
    draw = random.Random(1)
    texts = ["".join(chr(draw.randint(0x4E00, 0x9FD5)) for _ in range(draw.randint(2, 30))) for _ in range(2000)]
    assert [text for text in texts if segmenter.cut(text) != reference.lcut(text)] == []


@pytest.mark.skipif(version("rjieba") != VERIFIED_RJIEBA, reason=f"rjieba is not the verified {VERIFIED_RJIEBA}, so jieba does the routing")
@pytest.mark.parametrize("text", ["叠加入时", "灯黑豹骨"])
def test_near_ties_hang_on_the_total_of_frequencies(segmenter: Segmenter, reference: jieba.Tokenizer, text: str) -> None:
    assert segmenter.cut(text) == reference.lcut(text)
    assert segmenter.cut(text) != rjieba.Jieba().cut(text), "rjieba's total is jieba's now: drop the correction in _rjieba_route"


def test_without_rjieba_the_segments_are_the_same(segmenter: Segmenter, without_rjieba: Segmenter, reference: jieba.Tokenizer) -> None:
    words = [word for word, frequency in reference.FREQ.items() if frequency]
    for text in [PROSE, "", "\n", *fuzz(words, seed=2, count=300)]:
        assert without_rjieba.cut(text) == segmenter.cut(text) == reference.lcut(text)


def test_another_rjieba_is_not_trusted(reference: jieba.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_jieba() -> tuple:
        return lambda text: reference.lcut(text, HMM=False), lambda word: bool(reference.FREQ.get(word))

    monkeypatch.setattr("pangu.text.segmentation._installed_rjieba", lambda: "0.2.99")
    monkeypatch.setattr(
        "pangu.text.segmentation._rjieba_route", lambda: pytest.fail("the route was given to an rjieba that nobody compared")
    )
    monkeypatch.setattr("pangu.text.segmentation._jieba_route", by_jieba)
    assert Segmenter().cut("今天天气不错") == ["今天天气", "不错"]


def test_what_others_do_to_jieba_changes_nothing(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = segmenter.cut(PROSE)
    assert "杭研" in expected
    rjieba.add_word("他来到了网易", 10**9, None)
    monkeypatch.setattr(finalseg, "Force_Split_Words", {"杭研"})  # what jieba.del_word leaves behind, in all tokenizers
    monkeypatch.setattr(jieba, "re_han_default", re.compile("([\u4e00-\u9fd5a-zA-Z0-9+#&._%<>-]+)"))
    assert Segmenter().cut(PROSE) == expected
    assert capfd.readouterr() == ("", "")


def test_jiebas_shared_cache_is_neither_read_nor_written(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planted = marshal.dumps(({"今天天": 10**6, "今": 0, "今天": 0}, 10**6))
    (tmp_path / "jieba.cache").write_bytes(planted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Segmenter(use_rjieba=False).cut(PROSE) == segmenter.cut(PROSE)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("jieba.cache", planted)]
    assert capfd.readouterr() == ("", "")


def test_pickling(segmenter: Segmenter) -> None:
    assert len(pickle.dumps(segmenter)) < 200  # no dictionary inside
    assert pickle.loads(pickle.dumps(segmenter)).cut(PROSE) == segmenter.cut(PROSE)
