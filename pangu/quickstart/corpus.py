"""Writes the quickstart's corpus and its questions, from the tables in facts.py.

    python tools/make_quickstart_corpus.py --output runs/quickstart/data

writes corpus.txt (documents separated by a blank line, as tools/preprocess_data.py reads them) and questions.jsonl (one object per line:
`question`, `answer`, `kind`). The same seed gives the same bytes.

Every fact occurs often, as a question and as a statement in several wordings, so that a model of two million parameters learns it in
minutes. The questions therefore test only memorization: each of them, with its answer, is in the corpus.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from pangu.errors import InputError, exit_code
from pangu.quickstart.facts import KINDS, prompt

# How often a fact is told in one wording or another; a multiple of it for a hard one. Wordings and neighbours
# change from round to round.
ROUNDS = 12


def questions() -> Iterator[dict[str, str]]:
    """The question set: for every fact, the first question of its kind, with the answer."""
    for kind in KINDS:
        for row in kind.rows:
            yield {"question": kind.tell(kind.questions[0], row), "answer": kind.tell(kind.answer, row), "kind": kind.name}


def documents(seed: int) -> list[str]:
    """All documents of the corpus, in random order.

    In every round a fact is asked twice, once as the question set asks it and once in any wording, and stated once. A question is a
    document of its own, so that a model ends its answer where the document ends; statements of one kind share a document by one to four.
    """
    rng = random.Random(seed)
    texts: list[str] = []
    for kind in KINDS:
        for _ in range(ROUNDS * kind.times):
            for row in kind.rows:
                for question in (kind.questions[0], rng.choice(kind.questions)):
                    texts.append(prompt(kind.tell(question, row)) + kind.tell(kind.answer, row))
            if kind.statements:
                sentences = [kind.tell(rng.choice(kind.statements), row) for row in kind.rows]
                rng.shuffle(sentences)
                texts.extend(_grouped(sentences, rng))
    rng.shuffle(texts)
    return texts


def _grouped(sentences: list[str], rng: random.Random) -> Iterator[str]:
    """The sentences in their order, joined by one to four."""
    start = 0
    while start < len(sentences):
        end = start + rng.randint(1, 4)
        yield "".join(sentences[start:end])
        start = end


def write(directory: Path, seed: int) -> None:
    """Write corpus.txt and questions.jsonl into the directory, which is created if it does not exist.

    Raises:
        InputError: if the directory cannot be created or written.
    """
    asked = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "corpus.txt").write_text("\n\n".join(documents(seed)) + "\n", encoding="utf-8")
        (directory / "questions.jsonl").write_text(asked, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {directory}: cannot be written ({error.strerror}). Name a directory you may write to.") from error


@exit_code
def main() -> None:
    """Parse the command line and write the two files."""
    parser = argparse.ArgumentParser(description="Write the quickstart's corpus and questions.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for corpus.txt and questions.jsonl")
    parser.add_argument("--seed", type=int, default=1, help="seed of the order of documents and of the wordings (default: %(default)s)")
    arguments = parser.parse_args()
    write(arguments.output, arguments.seed)
    size = (arguments.output / "corpus.txt").stat().st_size
    print(f"{arguments.output}/corpus.txt: {size:,} bytes; questions.jsonl: {sum(1 for _ in questions()):,} questions")


if __name__ == "__main__":
    main()
