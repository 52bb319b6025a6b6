"""tools/make_quickstart_corpus.py: the same bytes every time, and a question set that the corpus answers and the model can learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.config import load_config
from pangu.config.layout import resolve
from pangu.quickstart import corpus as quickstart
from pangu.quickstart.facts import KINDS, prompt
from pangu.text.tokenizer import PanguTokenizer
from pangu.text.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "ds_configs/quickstart.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart")
    quickstart.write(directory, seed=1)
    return directory / "corpus.txt"


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> PanguTokenizer:
    return train_tokenizer([corpus], load_config(CONFIG).model.vocab_size, corpus.parent / "tokenizer")


def questions(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus.parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        quickstart.write(tmp_path / str(seed), seed)
    assert (tmp_path / "1/corpus.txt").read_bytes() == corpus.read_bytes()
    assert (tmp_path / "2/corpus.txt").read_bytes() != corpus.read_bytes()
    assert (tmp_path / "2/questions.jsonl").read_bytes() == (corpus.parent / "questions.jsonl").read_bytes()


def test_the_corpus_answers_every_question_in_the_form_that_is_asked(corpus: Path) -> None:
    documents = corpus.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert all(documents) and not any("\n" in document for document in documents)
    asked = questions(corpus)
    assert len(asked) > 100
    missing = {prompt(item["question"]) + item["answer"] for item in asked} - set(documents)
    assert not missing


def test_no_question_has_two_answers() -> None:
    answers: dict[str, str] = {}
    for kind in KINDS:
        for row in kind.rows:
            for question in kind.questions:
                answer = kind.tell(kind.answer, row)
                assert answers.setdefault(kind.tell(question, row), answer) == answer


def test_tables_are_rectangular_and_sentences_use_their_columns() -> None:
    for kind in KINDS:
        assert len(set(kind.rows)) == len(kind.rows)
        for row in kind.rows:
            assert len(row) == len(kind.columns) and all(row)
            for sentence in (*kind.questions, kind.answer, *kind.statements):
                assert "{" not in kind.tell(sentence, row)


def test_sums_are_right() -> None:
    [sums] = [kind.rows for kind in KINDS if kind.columns == ("a", "b", "sum")]
    assert len(sums) == 45
    assert all(int(a) + int(b) == int(total) <= 10 for a, b, total in sums)


def test_questions_and_answers_fit_the_recipes_window_and_vocabulary(corpus: Path, tokenizer: PanguTokenizer) -> None:
    config = load_config(CONFIG)
    assert tokenizer.vocab_size == config.model.vocab_size
    for item in questions(corpus):
        asked, told = tokenizer.encode(prompt(item["question"])), tokenizer.encode(prompt(item["question"]) + item["answer"])
        assert told[: len(asked)] == asked, "the prompt must be cut as it was in training"
        assert 0 not in told, "0 is <unk>"
        assert len(told) < config.model.max_positions


@pytest.mark.parametrize("overrides", [[], ["parallel.tensor=2"], ["parallel.tensor=2", "parallel.pipeline=2", "train.steps=20"]])
@pytest.mark.parametrize("data", [1, 2])
def test_recipe_fits_the_layouts_a_newcomer_tries(overrides: list[str], data: int) -> None:
    config = load_config(CONFIG, overrides)
    parallel = config.parallel
    assert resolve(config, parallel.tensor * parallel.pipeline * data).topology.data == data


def test_program_refuses_a_place_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "tools/make_quickstart_corpus.py", "--output", str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: --output ") and done.stderr.count("\n") == 1
