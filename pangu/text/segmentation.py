"""The word segmentation in front of PanGu-α's SentencePiece model: the segments of `jieba.cut` 0.42.1, several times faster.

The published tokenizer (arXiv 2104.12369, section 3) runs jieba's default mode: dictionary route, then a hidden Markov model for
what the route leaves as single characters. Token ids depend on every one of these cuts, so a faster implementation must not change any:

1. Blocks. jieba splits the text by `BLOCK`; whatever is outside a block is cut into single characters, "\\r\\n" staying whole.
2. Route. In each block the words of the most probable dictionary path. rjieba (Rust) and jieba compute it with the same double
   precision operations in the same order and the same rule for ties, over the same dictionary, so this step goes to rjieba, with its
   HMM off. For rjieba's dictionary that holds after one correction (`_rjieba_route`).
3. Runs. Neighbouring single characters of the route are joined and cut again by the HMM. rjieba rounds the HMM's emission
   probabilities to six decimals, and reads `www.example.com` as one word where jieba reads five, so this step is done here, with
   jieba's own tables, in jieba's order of additions.

Nothing here reads or writes jieba's process-wide state: `jieba.add_word`, `jieba.del_word` and `jieba.set_dictionary` elsewhere in
the process do not change ids. Nor is jieba's dictionary cache used: it is a marshal file of fixed name in the shared temporary
directory, which anyone on the machine could have put there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

# jieba 0.42.1: `re_han_default`, and in finalseg `re_han` and `re_skip`. jieba's own objects are not used, because programs patch them.
BLOCK = re.compile(r"([\u4E00-\u9FD5a-zA-Z0-9+#&._%\-]+)")
HAN_RUN = re.compile(r"([\u4E00-\u9FD5]+)")
LATIN_RUN = re.compile(r"([a-zA-Z0-9]+(?:\.\d+)?%?)")
OUTSIDE = re.compile(r"\r\n|[\s\S]")

FIRST_HAN = "\u4e00"  # every other character that a block can hold sorts before it

# The rjieba whose dictionary and route were compared with jieba 0.42.1. Another one may differ, so jieba itself is used then.
VERIFIED_RJIEBA = "0.2.2"

# Runs are short and come again: of those in twenty thousand lines of prose, three in four. Longer ones are not worth their memory.
MEMO_RUNS = 1 << 16
MEMO_CHARACTERS = 16

Cut = Callable[[str], list[str]]
CutRun = Callable[[str], Sequence[str]]
IsWord = Callable[[str], bool]


class Segmenter:
    """Cuts text into the segments of `jieba.cut(text, cut_all=False, HMM=True)`, jieba 0.42.1 with its default dictionary.

    Dictionary and tables are loaded at the first `cut` (about half a second, or 1.5 s without rjieba) and are not pickled. A forked
    worker shares what its parent had loaded; after loading only a cache of results is written.

    Args:
        use_rjieba: False computes the dictionary route with jieba instead of rjieba, to check that the segments are the same.
    """

    def __init__(self, *, use_rjieba: bool = True) -> None:
        self.use_rjieba = use_rjieba
        self._loaded: tuple[Cut, CutRun] | None = None

    def __reduce__(self) -> tuple[Callable[[bool], Segmenter], tuple[bool]]:
        return _new_segmenter, (self.use_rjieba,)

    def cut(self, text: str) -> list[str]:
        """The segments of `text`; joined together they are `text` again."""
        route, cut_run = self._loaded or self._load()
        segments: list[str] = []
        blocks = BLOCK.split(text)  # outside, block, outside, block, …, outside
        segments.extend(OUTSIDE.findall(blocks[0]))
        if len(blocks) == 1:
            return segments
        # One call for all blocks: a newline is never inside a block, so it separates them and comes back as a word of its own.
        words = route("\n".join(blocks[1::2]))
        words.append("\n")
        outside = iter(blocks[2::2])
        run = ""
        for word in words:
            if len(word) == 1:
                if word != "\n":
                    run += word
                    continue
            elif word < FIRST_HAN and word.isalnum() and word.isascii():
                # Without HMM the route joins single letters and digits. No dictionary word has letters and digits only.
                run += word
                continue
            if run:
                if len(run) == 1:
                    segments.append(run)
                else:
                    segments.extend(cut_run(run))
                run = ""
            if word == "\n":
                between = next(outside)
                if len(between) == 1:
                    segments.append(between)
                else:
                    segments.extend(OUTSIDE.findall(between))
            else:
                segments.append(word)
        return segments

    def _load(self) -> tuple[Cut, CutRun]:
        route, is_word = _rjieba_route() if self.use_rjieba and _installed_rjieba() == VERIFIED_RJIEBA else _jieba_route()
        self._loaded = route, _run_cutter(is_word)
        return self._loaded


def _new_segmenter(use_rjieba: bool) -> Segmenter:
    return Segmenter(use_rjieba=use_rjieba)


def _installed_rjieba() -> str | None:
    try:
        return version("rjieba")
    except PackageNotFoundError:
        return None


def _rjieba_route() -> tuple[Cut, IsWord]:
    """The dictionary route by rjieba, in an instance of our own so that a caller's `rjieba.add_word` stays the caller's."""
    import rjieba

    dictionary = rjieba.Jieba()
    # jieba's dict.txt has the line "B超 3 n" twice and jieba counts both in the total of frequencies; rjieba's copy has it once. The
    # total is in every probability, so near-ties would fall otherwise. Two newlines stand in for it: no block can contain them.
    dictionary.add_word("\n\n", 3, None)
    return lambda text: dictionary.cut(text, False), dictionary.has_word


def _jieba_route() -> tuple[Cut, IsWord]:
    """The same by jieba, slower. The dictionary is parsed from the package, past `initialize` with its cache file and its log lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 warns at import on Python 3.12 (invalid escape) and older setuptools (pkg_resources)
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return lambda text: tokenizer.lcut(text, HMM=False), lambda word: bool(tokenizer.FREQ.get(word))


def _run_cutter(is_word: IsWord) -> CutRun:
    """A function that cuts what the route left as neighbouring single characters, two or more."""
    viterbi = _viterbi()

    def cut(run: str) -> list[str]:
        if is_word(run):
            return list(run)  # a word that the route chose to spell out
        if min(run) >= FIRST_HAN:
            return viterbi(run)
        words: list[str] = []
        for part in HAN_RUN.split(run):
            if part >= FIRST_HAN:
                words.extend(viterbi(part))
            elif part:
                words.extend(word for word in LATIN_RUN.split(part) if word)
        return words

    @lru_cache(MEMO_RUNS)
    def remembered(run: str) -> tuple[str, ...]:
        return tuple(cut(run))  # unlike lists, which the garbage collector would visit again and again

    return lambda run: remembered(run) if len(run) <= MEMO_CHARACTERS else cut(run)


def _viterbi() -> Cut:
    """jieba's HMM over the states Begin, Middle, End, Single of a character in its word.

    Equal to `jieba.finalseg.viterbi` to the last bit: each candidate is (previous + transition) + emission in that order, and of two
    equal ones the alphabetically later state wins, as it does in Python's `max` over (probability, state).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jieba import finalseg
    states = "BMES"
    BEGIN, MIDDLE, END, SINGLE = range(4)
    never = finalseg.MIN_FLOAT
    emission = {
        char: tuple(finalseg.emit_P[state].get(char, never) for state in states) for state in states for char in finalseg.emit_P[state]
    }
    unknown = (never,) * 4
    start_b, start_m, start_e, start_s = (finalseg.start_P[state] for state in states)
    transition = finalseg.trans_P
    b_e, b_m, m_e, m_m = transition["B"]["E"], transition["B"]["M"], transition["M"]["E"], transition["M"]["M"]
    e_b, e_s, s_b, s_s = transition["E"]["B"], transition["E"]["S"], transition["S"]["B"], transition["S"]["S"]

    def cut(han: str) -> list[str]:
        if len(han) == 1:
            return [han]
        emit_b, emit_m, emit_e, emit_s = emission.get(han[0], unknown)
        b, m, e, s = start_b + emit_b, start_m + emit_m, start_e + emit_e, start_s + emit_s
        previous: list[tuple[int, int, int, int]] = []  # for each character in the middle, the state before it for each state of it
        for char in han[1:-1]:
            emit_b, emit_m, emit_e, emit_s = emission.get(char, unknown)
            b_after_e, b_after_s = e + e_b + emit_b, s + s_b + emit_b
            m_after_b, m_after_m = b + b_m + emit_m, m + m_m + emit_m
            e_after_b, e_after_m = b + b_e + emit_e, m + m_e + emit_e
            s_after_e, s_after_s = e + e_s + emit_s, s + s_s + emit_s
            b, before_b = (b_after_s, SINGLE) if b_after_s >= b_after_e else (b_after_e, END)
            m, before_m = (m_after_m, MIDDLE) if m_after_m >= m_after_b else (m_after_b, BEGIN)
            e, before_e = (e_after_m, MIDDLE) if e_after_m >= e_after_b else (e_after_b, BEGIN)
            s, before_s = (s_after_s, SINGLE) if s_after_s >= s_after_e else (s_after_e, END)
            previous.append((before_b, before_m, before_e, before_s))
        # The last character ends a word, so Begin and Middle are not asked for. Of the most frequent runs, those of two, that is half.
        _, _, emit_e, emit_s = emission.get(han[-1], unknown)
        e_after_b, e_after_m = b + b_e + emit_e, m + m_e + emit_e
        s_after_e, s_after_s = e + e_s + emit_s, s + s_s + emit_s
        s, before_s = (s_after_s, SINGLE) if s_after_s >= s_after_e else (s_after_e, END)
        e, before_e = (e_after_m, MIDDLE) if e_after_m >= e_after_b else (e_after_b, BEGIN)
        state = before_s if s >= e else before_e
        if not previous:
            return [han[0], han[1]] if state >= END else [han]
        ends = [len(han)]
        for position in range(len(han) - 1, 0, -1):  # `state` is that of the character before `position`
            if state >= END:
                ends.append(position)  # a word ends after End and after Single, and nowhere else
            if position > 1:
                state = previous[position - 2][state]
        ends.append(0)
        ends.reverse()
        return [han[start:end] for start, end in pairwise(ends)]

    return cut
