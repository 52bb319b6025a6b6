"""Metrics: values computed by hand, and many cases against a second implementation that follows the official definitions literally."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

from pangu.evaluation.answer_metrics import bootstrap, exact_match, f1, restore_punctuation, rouge_1, segments, wilson

# What nltk.word_tokenize 3.10 (its Treebank part) gives.
NLTK = {
    "hello world": ["hello", "world"],
    "iphone 6s": ["iphone", "6s"],
    "1,000 km": ["1,000", "km"],
    "3.14": ["3.14"],
    "u.s.a.": ["u.s.a", "."],
    "e.g. this": ["e.g.", "this"],
    "mr. smith": ["mr.", "smith"],
    "don't": ["do", "n't"],
    "it's good": ["it", "'s", "good"],
    "they'll": ["they", "'ll"],
    "o'neil": ["o'neil"],
    "cannot": ["can", "not"],
    "gonna go": ["gon", "na", "go"],
    "(abc)": ["(", "abc", ")"],
    "at&t": ["at", "&", "t"],
    "100%": ["100", "%"],
    "$5": ["$", "5"],
    "a@b.com": ["a", "@", "b.com"],
    "abc, def": ["abc", ",", "def"],
    "a,b": ["a", ",", "b"],
    "1,2": ["1,2"],
    "100,000.5": ["100,000.5"],
    "a...b": ["a", "...", "b"],
    "end.": ["end", "."],
    "what?": ["what", "?"],
    "x!y": ["x", "!", "y"],
    "a;b": ["a", ";", "b"],
    "[1]": ["[", "1", "]"],
    "<a>": ["<", "a", ">"],
    "'quoted'": ["'", "quoted", "'"],
    "5'": ["5", "'"],
    "é à": ["é", "à"],
    "カタカナ abc": ["カタカナ", "abc"],
    "a…b": ["a…b"],
}


@pytest.mark.parametrize("text", NLTK)
def test_latin_words_are_cut_as_nltk_does(text: str) -> None:
    assert segments(text) == NLTK[text]


def test_mixed_segmentation() -> None:
    assert segments(" 他用iPhone 6S拍了3.5小时，真好！") == ["他", "用", "iphone", "6s", "拍", "了", "3.5", "小", "时", "真", "好"]
    assert segments("Wi-Fi：开") == ["wifi", "开"]  # a dropped mark does not end a word, as in the official script
    assert segments("你,好") == ["你", ",", "好"]  # the list has the full-width comma only
    assert segments("") == segments("，。！") == []


@pytest.mark.parametrize(
    ("answers", "prediction", "em", "expected"),
    [
        (["成都"], "成都", 1, 1.0),
        (["成都"], "成都。", 1, 1.0),
        (["成都"], "四川成都", 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        (["四川省成都市"], "成都", 0, 2 * 1 * (2 / 6) / (1 + 2 / 6)),
        (["甲乙丙丁"], "甲丙乙丁", 0, 0.25),  # one character is the longest common run; a bag would give 1
        (["五点", "清晨五点"], "清晨五点", 1, 1.0),
        (["五点", "早上"], "五点半", 0, 0.8),
        (["iPhone 6S"], "iphone 6s", 1, 1.0),
        (["iPhone 6S"], "iphone", 0, 2 * 1 * 0.5 / 1.5),
        (["成都"], "", 0, 0.0),
        (["，"], "", 1, 0.0),  # nothing equals nothing, but has no run in common
    ],
)
def test_em_and_f1_by_hand(answers: list[str], prediction: str, em: int, expected: float) -> None:
    assert exact_match(answers, prediction) == em
    assert f1(answers, prediction) == pytest.approx(expected)


OFFICIAL = ["-", ":", "_", "*", "^", "/", "\\", "~", "`", "+", "=", *"，。：？！“”；’《》", "……", *"·、「」（）－～『』"]


def official_segments(text: str) -> list[str]:
    kept = [char for char in text.lower().strip() if char not in OFFICIAL]
    pieces, latin = [], ""
    for char in [*kept, "一"]:
        if "\u4e00" <= char <= "\u9fa5":
            pieces += NLTK[latin.strip()] if latin.strip() in NLTK else latin.split()
            pieces.append(char)
            latin = ""
        else:
            latin += char
    return pieces[:-1]


def official_f1(answers: list[str], prediction: str) -> float:
    scores = []
    for answer in answers:
        one, other = official_segments(answer), official_segments(prediction)
        runs = [end - begin for begin, end in product(range(len(one) + 1), repeat=2) if begin < end and contains(other, one[begin:end])]
        if not runs:
            scores.append(0.0)
            continue
        precision, recall = max(runs) / len(other), max(runs) / len(one)
        scores.append(2 * precision * recall / (precision + recall))
    return max(scores)


def contains(whole: list[str], part: list[str]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def official_em(answers: list[str], prediction: str) -> int:
    plain = ["".join(char for char in text.lower().strip() if char not in OFFICIAL) for text in (*answers, prediction)]
    return int(plain[-1] in plain[:-1])


def official_rouge(answers: list[str], prediction: str) -> float:
    best = 0.0
    for answer in answers:
        one, other = [list(text.lower().replace(" ", "").replace("\n", "")) for text in (answer, prediction)]
        common = sum(min(count, other.count(char)) for char, count in Counter(one).items())
        if common:
            precision, recall = common / len(other), common / len(one)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


ATOMS = [
    *"甲乙丙丁戊成都四川",
    *"，。！？《》“”（）、·…—-:_/",
    "iPhone",
    " 6S ",
    "U.S.A. ",
    "Wi-Fi",
    " 3.14 ",
    "1,000 km",
    "don't",
    " ",
    "",
    "Ａ",
    "，，",
]


def crafted() -> list[tuple[list[str], str]]:
    """Answers and predictions of shared atoms: mixed scripts, punctuation, several answers, equal ones, empty ones."""
    rng = random.Random(11)
    cases = []
    for _ in range(300):
        prediction = "".join(rng.choices(ATOMS, k=rng.randint(0, 9)))
        answers = ["".join(rng.choices(ATOMS, k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            answers.append(rng.choice(["", "，"]) + prediction.upper() + rng.choice(["", "。", "了"]))
        cases.append((answers, prediction))
    return cases


def test_em_f1_and_rouge_agree_with_a_second_implementation() -> None:
    seen: Counter[str] = Counter()
    for answers, prediction in crafted():
        if any("don't" in text.lower() or "u.s.a" in text.lower() or "1,000" in text for text in (*answers, prediction)):
            seen["latin"] += 1  # glued to a neighbour these are none of NLTK's samples; both implementations then need not agree
            answers = [text.replace("don't", "dont").replace("U.S.A. ", " usa ").replace("1,000", "1000") for text in answers]
            answers = [text.replace("DON'T", "dont").replace("u.s.a. ", " usa ") for text in answers]
            prediction = prediction.replace("don't", "dont").replace("U.S.A. ", " usa ").replace("1,000", "1000")
        assert f1(answers, prediction) == pytest.approx(official_f1(answers, prediction)), (answers, prediction)
        assert exact_match(answers, prediction) == official_em(answers, prediction), (answers, prediction)
        assert rouge_1(answers, prediction) == pytest.approx(official_rouge(answers, prediction)), (answers, prediction)
        seen["partial"] += 0 < f1(answers, prediction) < 1
        seen["exact"] += exact_match(answers, prediction) == 1
        seen["none"] += f1(answers, prediction) == 0
    assert min(seen.values()) >= 20 and len(seen) == 4, seen


def test_rouge_by_hand() -> None:
    assert rouge_1(["放在铁罐里"], "铁罐里") == pytest.approx(2 * 3 / 8)
    assert rouge_1(["甲甲乙"], "甲 甲 甲") == pytest.approx(2 * 2 / 6)
    assert rouge_1(["甲", "丙丁"], "丁丙") == 1.0  # a bag has no order
    assert rouge_1(["甲"], "") == rouge_1([], "甲") == 0.0


def test_punctuation_that_the_tokenizer_folded_comes_back_beside_chinese() -> None:
    assert restore_punctuation("你好,世界!(对吗?)") == "你好，世界！（对吗？）"
    assert restore_punctuation("1,000 km (a, b) 3:20") == "1,000 km (a, b) 3:20"
    assert exact_match(["好，很好"], restore_punctuation("好,很好")) == 1 and exact_match(["好，很好"], "好,很好") == 0


def test_wilson_is_the_textbook_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0) and wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_seeded_and_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(3).random(400)
    rows = [[value] for value in values]

    def mean(means: np.ndarray) -> np.ndarray:
        return means[:, 0]

    low, high = bootstrap(rows, mean, seed=7)
    assert (low, high) == bootstrap(rows, mean, seed=7) != bootstrap(rows, mean, seed=8)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
