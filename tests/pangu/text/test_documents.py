"""Which documents a text file holds, wherever it is cut into blocks, and what is refused."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import pytest
import zstandard
from helpers.bounded import bounded

from pangu.errors import InputError
from pangu.text import documents as text
from pangu.text.documents import documents, input_size, read_blocks

TXT = "\n\n第一篇，第一行\n第二行\n\n\n\n  second document \r\n\r\n 第三篇\u2028同一行\r\n它的第二行\n\nlast"
DOCUMENTS = ["第一篇，第一行\n第二行", "  second document ", " 第三篇\u2028同一行\n它的第二行", "last"]


def read(path: Path, block_bytes: int = 1 << 18, key: str = "text") -> list[str]:
    return [document for block in read_blocks(path, block_bytes) for document in documents(block, key)]


def compressed(path: Path, data: bytes, suffix: str, parts: int = 1) -> Path:
    """The data, joined from several compressed files as `cat` would."""
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    step = -(-len(data) // parts)
    path = path.with_name(path.name + suffix)
    path.write_bytes(b"".join(compress(data[start : start + step]) for start in range(0, len(data), step)))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("parts", [1, 3])
def test_documents_do_not_depend_on_the_blocks(tmp_path: Path, suffix: str, parts: int) -> None:
    path = compressed(tmp_path / "corpus.v1.txt", TXT.encode(), suffix, parts)
    for block_bytes in range(4, 130):
        assert read(path, block_bytes) == DOCUMENTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    texts = [*DOCUMENTS, "", "a\n\nb", "\U00020bb7", "\U00020bb7"]
    data = "\r\n".join(json.dumps({"text": value, "id": 1}, ensure_ascii=index % 2 == 1) for index, value in enumerate(texts)) + "\n\n"
    path = compressed(tmp_path / "corpus.jsonl", data.encode(), suffix)
    for block_bytes in range(4, 200, 7):
        assert read(path, block_bytes) == texts


def test_blocks_are_small_and_say_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"".join(b"document %04d\nline\n\n" % number for number in range(1000)))
    data = path.read_bytes()
    blocks = list(read_blocks(path, 256))
    assert b"".join(block.data for block in blocks) == data
    for block in blocks:
        assert len(block.data) < 3 * 256
        assert data[block.offset :].startswith(block.data)
        assert block.line == data[: block.offset].count(b"\n") + 1
    assert blocks[-1].bytes_read == input_size(path) == len(data)


def test_a_long_document_does_not_make_the_blocks_after_it_long(tmp_path: Path) -> None:
    """Nor is a boundary overlooked that lies across two reads."""
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"x" * 1023 + b"\n\n" + (b"y" * 50 + b"\n\n") * 100)
    lengths = [len(block.data) for block in read_blocks(path, 256)]
    assert lengths[0] <= 1023 + 2 + 256 and max(lengths[1:]) < 2 * 256
    path.write_bytes(b"x" * 255 + b"\n\n" + b"y" * 254)
    assert [len(block.data) for block in read_blocks(path, 256)] == [257, 254]


def test_byte_order_mark_and_no_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "文".encode())
    assert read(path) == ["文"]
    path.write_bytes(b"")
    assert read(path) == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [8, 1 << 18])
def test_invalid_utf8_names_the_byte(tmp_path: Path, suffix: str, block_bytes: int) -> None:
    data = b"\xef\xbb\xbf" + "好的\n\n".encode() * 20 + "你好".encode("gb18030")
    path = compressed(tmp_path / "corpus.txt", data, suffix)
    message = r"corpus\.txt.*: byte 0xc4 at offset 163 of the text is not UTF-8\. Convert the file"
    with pytest.raises(InputError, match=message):
        read(path, block_bytes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not JSON \(Expecting property name"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('"text"', "a str found, an object with a text under 'text' expected"),
        ('{"content": "x", "id": 1}', "an object with the keys content, id found, .* Name its key with --json-key"),
        ('{"text": null}', "an object with the keys text found"),
        (r'{"text": "\ud800x"}', "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("block_bytes", [4, 1 << 18])
def test_bad_json_names_the_line(tmp_path: Path, line: str, message: str, block_bytes: int) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": "y"}\n' + line + '\n{"text": "z"}\n')
    with pytest.raises(InputError, match=rf"corpus\.jsonl:4: {message}") as refusal:
        read(path, block_bytes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_truncation_of_a_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / "corpus.txt", TXT.encode(), suffix, parts=2)
    whole = path.read_bytes()
    first_part = len(compressed(tmp_path / "half.txt", TXT.encode()[: -(-len(TXT.encode()) // 2)], suffix).read_bytes())
    for length in range(1, len(whole)):
        if length != first_part:  # a whole file of its own
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=rf"corpus\.txt{suffix}: compressed data expected to go on, the file ends after {length} "):
                read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_file(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / "corpus.txt", TXT.encode(), suffix)
    path.write_bytes(path.read_bytes() + b"rubbish")
    with pytest.raises(InputError, match=r"damaged near byte .* Fetch the file again"):
        read(path)


def test_zero_padding_and_skippable_frames(tmp_path: Path) -> None:
    path = compressed(tmp_path / "corpus.txt", TXT.encode(), ".gz")
    path.write_bytes(path.read_bytes() + bytes(512))
    assert read(path) == DOCUMENTS
    path = compressed(tmp_path / "corpus.txt", TXT.encode(), ".zst")
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(skippable + path.read_bytes() + skippable)
    assert read(path) == DOCUMENTS


def test_a_file_without_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"a\n\nb\n" + b"line\n" * 300_000)
    with pytest.raises(InputError, match=r"corpus\.txt:3: the document that begins here has more than 1 MiB"):
        read(path, 1 << 16)


@pytest.mark.parametrize("name", ["corpus", "corpus.csv", "corpus.gz", "corpus.txt.bz2", "txt"])
def test_unknown_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=r"\.txt or \.jsonl expected"):
        input_size(tmp_path / name)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "directory.txt").mkdir()
    for name, reason in (("missing.txt", "No such file"), ("directory.txt", "Is a directory")):
        with pytest.raises(InputError, match=rf"{name}: cannot be read: {reason}"):
            input_size(tmp_path / name)


def bomb(size: int, suffix: str) -> bytes:
    """Some kilobytes that expand to `size` zeros."""
    if suffix == ".gz":
        packer = zlib.compressobj(9, wbits=31)
        return b"".join(packer.compress(bytes(1 << 24)) for _ in range(size >> 24)) + packer.flush()
    packer = zstandard.ZstdCompressor(level=19).compressobj()
    return b"".join(packer.compress(bytes(1 << 24)) for _ in range(size >> 24)) + packer.flush()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_expands_beyond_any_document_is_refused_in_little_memory(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(bomb(1 << 30, suffix))
    assert path.stat().st_size < 1 << 21
    with bounded(text.MAX_DOCUMENT_BYTES), pytest.raises(InputError, match="has more than 16 MiB"):
        read(path)


def test_a_frame_that_wants_a_large_window_is_refused(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    path = tmp_path / "corpus.txt.zst"
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(packer.compress(b"text" * 100) + packer.flush())
    with pytest.raises(InputError, match="window of at most 128 MiB"):
        read(path)


def test_zstandard_in_all_its_forms(tmp_path: Path) -> None:
    data = "\n\n".join(f"第{number}篇 " + "x" * (number % 700) for number in range(3000)).encode()
    for level in (-5, 1, 3, 19):
        for checksum in (False, True):
            for known in (False, True):
                packer = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=known)
                path = tmp_path / "corpus.txt.zst"
                path.write_bytes(packer.compress(data) + packer.compress(b"\n\nlast"))
                assert "\n\n".join(read(path)).encode() == data + b"\n\nlast"
