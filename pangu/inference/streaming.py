"""Text while it is being generated: what can be shown of it, and where a stop string ends it.

The text of a few ids need not begin the text of those and more. A tokenizer with byte pieces spells one character in several ids, which
decode to U+FFFD until the last of them; and what may be the beginning of a stop string must not be shown before that is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pangu.errors import InputError
from pangu.text.tokenizer import PanguTokenizer

INCOMPLETE = "\ufffd"
"""What decodes from part of a character."""


class TextStream:
    """The text of one row: give it the ids one by one; what it gives back, joined, is `text`.

    Args:
        decode: ids to text.
        stops: strings before which the text ends, as they look when decoded (`decoded_stops`). The one that is complete first counts; of
            several that one token completes, the one that begins first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self.ids: list[int] = []
        self.text = ""
        """What was given back so far."""
        self.stopped = False
        """Whether a stop string has ended the text."""

    def add(self, token_id: int) -> str:
        """Take the next id; give the text that is now certain, often "" and never part of a character."""
        self.ids.append(token_id)
        whole = self._decode(self.ids)
        found = [at for stop in self._stops if (at := whole.find(stop, len(self.text))) >= 0]
        if found:
            self.stopped = True
            return self._give(whole[: min(found)])
        certain = whole.rstrip(INCOMPLETE)
        return self._give(certain[: len(certain) - self._undecided(certain)])

    def end(self) -> str:
        """No more ids come: give the rest, whatever it might have become."""
        return "" if self.stopped else self._give(self._decode(self.ids))

    def _undecided(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        return max((size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)

    def _give(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def decoded_stops(stops: Sequence[str], tokenizer: PanguTokenizer) -> list[str]:
    """Stop strings as they stand in decoded text: the tokenizer folds ：to :, so that "问：" would never be found.

    Raises:
        InputError: if nothing is left of one, or the vocabulary cannot write it.
    """
    decoded = []
    for stop in stops:
        ids = tokenizer.encode(stop)
        text = tokenizer.decode(ids)
        if not text:
            raise InputError(f"stop = {stop!r}: nothing is left of it in the tokenizer's text. Give a string that can be generated.")
        if tokenizer.unk_id in ids:
            raise InputError(f"stop = {stop!r}: the vocabulary lacks one of its characters, so it is never generated. Give another string.")
        decoded.append(text)
    return decoded
