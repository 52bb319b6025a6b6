"""tools/train_tokenizer.py: a model of the published kind, the same one every time, and one line for what cannot work."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from pangu.errors import InputError
from pangu.text.tokenizer import PanguTokenizer
from pangu.text.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 86  # between the characters of the corpus and the pieces that it yields at most


PLACES = ["四川", "北京", "上海", "广州", "成都", "杭州", "中国", "学校", "公司", "医院", "图书馆", "公园", "车站"]
PREDICATES = [
    "的天气很好",
    "是一个大城市",
    "有 3.5 元的午饭",
    "在2020年开放",
    "<eot>了",
    "没有下雨",
    "今天人很多",
    "离这里不远",
    "欢迎我们",
    "正在建设",
]


def sentences(count: int) -> list[str]:
    draw = random.Random(5)
    return [f"{draw.choice(PLACES)}{draw.choice(PREDICATES)}，{draw.choice(PLACES)}{draw.choice(PREDICATES)}。\n" for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(sentences(400)), "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> PanguTokenizer:
    return train_tokenizer([corpus], VOCAB_SIZE, corpus.parent / "trained")


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60, check=False)


def test_program_says_one_line_and_writes_one_file(corpus: Path, trained: PanguTokenizer, tmp_path: Path) -> None:
    done = run("--input", corpus, "--vocab-size", VOCAB_SIZE, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"{tmp_path / 'out' / 'vocab.model'}: {VOCAB_SIZE} pieces, sha256 {trained.sha256}\n"
    )  # and the same model as in this process
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vocab.model"]


def test_special_pieces_have_the_published_ids(trained: PanguTokenizer) -> None:
    published = ["<unk>", "<s>", "</s>", "▃", "▂", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"]
    assert [trained.id_to_piece(token_id) for token_id in range(10)] == published
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    assert [model.is_control(token_id) for token_id in range(10)] == [False, True, True] + [False] * 7
    assert not any(model.is_byte(token_id) for token_id in range(len(trained)))


def test_text_comes_back_and_forges_nothing(trained: PanguTokenizer) -> None:
    text = "".join(sentences(20)).replace("，", ",")  # the normaliser folds the full-width comma
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {0, 1, 2, 5, 6, 7, 8, 9} & set(ids)  # no <unk> at full coverage, and "<eot>" stays text
    assert trained.encode("四川<eot>", allow_special=True)[-1] == trained.eot_id == 9


def test_several_files_and_a_replaced_model(corpus: Path, tmp_path: Path) -> None:
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    halves[0].write_text("".join(lines[:200]), "utf-8")
    halves[1].write_text("".join(lines[200:]), "utf-8")
    (tmp_path / "vocab.model").write_bytes(b"old")
    assert train_tokenizer(halves, VOCAB_SIZE, tmp_path).sha256 == train_tokenizer([corpus], VOCAB_SIZE, tmp_path).sha256


def test_lines_longer_than_sentencepieces_default_are_learned(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(sentences(400)).replace("\n", ""), "utf-8")
    assert path.stat().st_size > 4192
    assert train_tokenizer([path], VOCAB_SIZE, tmp_path).encode("四川的天气很好")


BAD: dict[str, tuple[bytes | None, int, float, str]] = {
    "missing file": (None, 100, 1.0, r"corpus\.txt: no such file"),
    "empty": (b"", 100, 1.0, "no text to train"),
    "blank": (b" \n\n\t\n", 100, 1.0, "no text to train"),
    "not UTF-8": ("天气很好\n".encode() * 50 + "天气".encode("gbk"), 30, 1.0, "is not UTF-8"),
    "vocabulary too large": ("天气很好\n".encode() * 50, 8000, 1.0, r"yields at most \d+ pieces. Choose \d+ or fewer"),
    "vocabulary too small for the characters": (
        "".join(map(chr, range(0x4E00, 0x4F00))).encode(),
        100,
        1.0,
        "need 2[67]. at character coverage",
    ),
    "vocabulary of special pieces only": ("天气很好\n".encode(), 10, 1.0, "special pieces alone are 10"),
    "negative vocabulary": ("天气很好\n".encode(), -4, 1.0, "special pieces alone are 10"),
    "coverage": ("天气很好\n".encode(), 20, 1.5, "character coverage 1.5"),
}


@pytest.mark.parametrize(("content", "vocab_size", "coverage", "says"), BAD.values(), ids=BAD.keys())
def test_what_cannot_work_is_refused_in_one_line(
    content: bytes | None, vocab_size: int, coverage: float, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "vocab.model").write_bytes(b"old")
    with pytest.raises(InputError, match=says) as refusal:
        train_tokenizer([path], vocab_size, tmp_path, character_coverage=coverage)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "vocab.model").read_bytes() == b"old"
    assert capfd.readouterr() == ("", "")


def test_refusal_is_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    refused = run("--input", corpus, "--vocab-size", "100000", "--output", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: vocabulary size 100,000: ")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_a_directory(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a directory that can be created"):
        train_tokenizer([corpus], VOCAB_SIZE, tmp_path / "file")


def test_lower_coverage_leaves_the_rarest_characters_out(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(corpus.read_text("utf-8") + "饕餮\n", "utf-8")
    assert 0 not in train_tokenizer([path], VOCAB_SIZE + 2, tmp_path).encode("饕餮")
    assert 0 in train_tokenizer([path], VOCAB_SIZE, tmp_path, character_coverage=0.9995).encode("饕餮")
