"""The smallest file that SentencePiece takes for a model, written by hand: for tests that only carry one along."""

from __future__ import annotations

NORMAL, UNKNOWN = 1, 2


def tiny_model(*pieces: str) -> bytes:
    """A serialized `ModelProto`: `<unk>` and some pieces. Field 1 is a piece: its text (1) and its type (3)."""
    return b"".join(_piece(text, UNKNOWN if text == "<unk>" else NORMAL) for text in ("<unk>", *(pieces or ("a",))))


def _piece(text: str, kind: int) -> bytes:
    data = text.encode()
    body = b"\x0a" + bytes([len(data)]) + data + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body
