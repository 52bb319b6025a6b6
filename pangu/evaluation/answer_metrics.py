"""Metrics of written answers, and confidence intervals.

EM and F1 follow the official script of CMRC 2018 (version 4; github.com/ymcui/cmrc2018, eval/cmrc2018_evaluate.py), which differs from
SQuAD's: F1 counts the longest common *substring* of segments, not their common bag. Rouge-1 counts characters.
All scores are in [0, 1].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

# The official list. Its "……" is two characters and is compared with one at a time, so it drops nothing there either.
PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("[\u4e00-\u9fa5]")

# Treebank's rules for English as nltk.word_tokenize has them, so that no data need be downloaded. One thing differs: a double quote stays
# one, where Treebank tells opening from closing.
_CLITIC = r"n't\b|'(?:s|m|d|ll|re|ve)\b"
_SINGLE = r"[;@#$%&?!()\[\]{}<>\"]|(?<!\d),|,(?!\d)|\.(?=\s*$)|'(?!\w)|(?<!\w)'"
_LATIN = re.compile(rf"\.{{2,}}|{_CLITIC}|{_SINGLE}|(?:(?!{_CLITIC}|{_SINGLE}|\.{{2,}})\S)+")
_CONTRACTED = re.compile(r"\b(can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|wan(?=na\b))")

# What the tokenizer's NFKC makes of Chinese punctuation, and back.
_ASCII_TO_FULL = str.maketrans(",:;?!()", "，：；？！（）")
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,:;?!()]+|[,:;?!()]+(?=[\u4e00-\u9fff])")


def restore_punctuation(text: str) -> str:
    """Restore the full-width form of punctuation next to a Chinese character, which the tokenizer folds into ASCII (，：；？！（）).

    The official definitions drop the full-width form and keep most ASCII: a generated comma would count as a wrong segment.
    """
    return _BESIDE_CHINESE.sub(lambda match: match[0].translate(_ASCII_TO_FULL), text)


def segments(text: str) -> list[str]:
    """The segments that F1 counts: single Chinese characters, words of other text, without the listed punctuation; lower case."""
    found: list[str] = []
    latin = ""
    for char in text.lower().strip():
        if char in PUNCTUATION:
            continue  # without ending a word: "wi-fi" is "wifi"
        if _CHINESE.match(char):
            found += _latin_words(latin)
            found.append(char)
            latin = ""
        else:
            latin += char
    return found + _latin_words(latin)


def _latin_words(text: str) -> list[str]:
    return _LATIN.findall(_CONTRACTED.sub(r"\1 ", text))


def exact_match(answers: Sequence[str], prediction: str) -> float:
    """1 if the prediction is one of the answers, ignoring case, outer space and the listed punctuation, else 0."""

    def plain(text: str) -> str:
        return "".join(char for char in text.lower().strip() if char not in PUNCTUATION)

    return float(any(plain(answer) == plain(prediction) for answer in answers))


def f1(answers: Sequence[str], prediction: str) -> float:
    """Harmonic mean of the longest common substring's share in the prediction and in the answer; the best of all answers."""
    predicted = segments(prediction)
    return max(
        (_harmonic(_longest_common(own := segments(answer), predicted), len(predicted), len(own)) for answer in answers), default=0.0
    )


def rouge_1(answers: Sequence[str], prediction: str) -> float:
    """Harmonic mean of the common characters' share in the prediction and in the answer, ignoring white space; the best of all answers."""
    predicted = Counter("".join(prediction.lower().split()))
    best = 0.0
    for answer in answers:
        own = Counter("".join(answer.lower().split()))
        best = max(best, _harmonic((own & predicted).total(), predicted.total(), own.total()))
    return best


def _harmonic(common: int, num_predicted: int, num_expected: int) -> float:
    return 2 * common / (num_predicted + num_expected) if common else 0.0  # 2PR / (P + R), shortened


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest run of segments that both have."""
    best = 0
    lengths = [0] * (len(other) + 1)  # of the common run that ends at a pair of places
    for segment in one:
        lengths = [0, *(lengths[at] + 1 if segment == there else 0 for at, there in enumerate(other))]
        best = max(best, *lengths)
    return best


def wilson(successes: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927), which is never empty and never outside [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share, spread = successes / total, z * z / total
    center, half = share + spread / 2, z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))


def bootstrap(
    samples: Sequence[Sequence[float]], figure: Callable[[np.ndarray], np.ndarray], seed: int, draws: int = 1000
) -> tuple[float, float]:
    """The 95 % bootstrap confidence interval of a figure, from `draws` resamples of the examples with replacement (percentiles).

    Args:
        samples: one row of numbers per example.
        figure: function of the columns' means: [draws, columns] -> [draws].
        seed: the same seed gives the same interval.
        draws: number of resamples.
    """
    rows = np.asarray(samples, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.stack([rows[rng.integers(0, len(rows), len(rows))].mean(axis=0) for _ in range(draws)])
    low, high = np.percentile(figure(means), [2.5, 97.5], method="inverted_cdf")  # no mean of two, one of which may be infinite
    return float(low), float(high)
