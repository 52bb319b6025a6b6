"""Streamed text: never part of a character, never what a stop string would take back, and in the end the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pangu.errors import InputError
from pangu.inference.streaming import TextStream, decoded_stops
from pangu.text.tokenizer import PanguTokenizer


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose ids are bytes: a Chinese character takes three, an emoji four."""
    return bytes(ids).decode("utf-8", errors="replace")


def streamed(text: str, stops: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode_bytes, stops)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.add(byte))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream


def test_a_character_comes_whole() -> None:
    pieces, stream = streamed("四a川🐼")
    assert pieces == ["", "", "四", "a", "", "", "川", "", "", "", "🐼", ""]
    assert stream.text == "四a川🐼" and not stream.stopped


def test_what_never_becomes_a_character_comes_at_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.add(byte) for byte in (*b"a", *"四".encode()[:2])] == ["a", "", ""]
    assert stream.end() == "\ufffd" == stream.text[1:]
    other = TextStream(decode_bytes)
    assert [other.add(byte) for byte in (*"四".encode()[:2], *b"a")] == ["", "", "\ufffda"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("问：好。答：是。问：二", ["问："], ""),
        ("好。答：是。问：二", ["问："], "好。答：是。"),
        ("aab", ["aab"], ""),
        ("aaab", ["aab"], "a"),  # the first of the three did not begin it
        ("abcabd", ["abd"], "abc"),
        ("xyz", ["yz", "xyzw"], "x"),  # complete first, though the other began first
        ("abcd", ["d", "abcd"], ""),  # complete at once: the one that begins first
    ],
)
def test_a_stop_string_is_never_shown(text: str, stops: list[str], expected: str) -> None:
    pieces, stream = streamed(text, stops)
    assert stream.stopped
    assert "".join(pieces) == stream.text == expected


def test_the_beginning_of_a_stop_string_is_shown_once_it_is_none() -> None:
    pieces, stream = streamed("abxab", ["abc"])
    assert pieces == ["", "", "abx", "", "", "ab"]
    assert not stream.stopped


def test_text_of_the_published_tokenizer(shared: Path) -> None:
    tokenizer = PanguTokenizer(shared / "tokenizer")
    text = "四川的省会是成都，对吗？\n是的 𠮷 <eot> Ａ１…㎡ e\u0301。"
    ids = [*tokenizer.encode(text), tokenizer.eot_id, tokenizer.unk_id, tokenizer.unk_id, 1, 2, 3, 4, 13]
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)  # nothing is left for the end
    assert sum(map(bool, pieces)) > 10
    assert stream.end() == ""


def test_stop_strings_are_looked_for_as_they_are_decoded(shared: Path) -> None:
    tokenizer = PanguTokenizer(shared / "tokenizer")
    assert decoded_stops(["问：", "\n\n", "Ａ b", "<eot>"], tokenizer) == ["问:", "\n\n", "A b", "<eot>"]
    for stop, message in (("", "nothing is left"), ("\t", "nothing is left"), ("𠮷", "lacks one of its characters")):
        with pytest.raises(InputError, match=message):
            decoded_stops([stop], tokenizer)
