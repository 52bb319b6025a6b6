"""Train a tiny model from scratch and ask it questions, in a few minutes on two CPU cores.

    pangu demo            # or, in a checkout on a fresh machine: make demo

writes a corpus, trains a tokenizer, turns the text into tokens, trains a tiny PanGu on two tensor-parallel processes, and asks it. Every
stage prints its command, to be copied. All files go to runs/quickstart, which is emptied first.

The questions are in the corpus in the same words: this shows that tokenizer, training, tensor parallelism and generation work
together, not that a model of this size understands anything. The answers come from the trained weights alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pangu.config.parsing import read_yaml
from pangu.config.recipes import find_recipe
from pangu.errors import InputError, exit_code
from pangu.quickstart.facts import prompt
from pangu.training.curves import print_curves, read_run

CONFIG = "quickstart"
DIRECTORY = "runs/quickstart"  # where the configuration expects its data, and writes its run
MARKER = ".made-by-demo"  # in a directory that the demo may delete
PROCESSES = 2
REQUIRED_SHARE = 0.9
SHOWN = ("四川的省会是哪里？", "法国的首都是哪里？", "巴西利亚是哪个国家的首都？", "《静夜思》的作者是谁？", "3加5等于几？", "你是谁？")


class StageError(Exception):
    """A stage's program failed and has printed why."""


@contextmanager
def stage(title: str) -> Iterator[None]:
    """A context that prints the title of a stage, and its time in seconds at the end."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def run(*command: str | Path, **environment: str) -> None:
    """Print a command in shell syntax, run it, and pass on its output.

    Raises:
        StageError: if its exit code is not 0.
    """
    words = [str(word) for word in command]
    print("$ " + " ".join([f"{key}={value}" for key, value in environment.items()] + [shlex.join(words)]), flush=True)
    code = subprocess.run(words, env=os.environ | environment, check=False).returncode
    if code:
        raise StageError(f"exit code {code} from the command above.")


def python() -> str:
    """The path of this interpreter, in the form that a user would type."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def launcher(processes: int) -> list[str]:
    """`torchrun` of this interpreter's environment; the same module where the script is not installed beside it."""
    torchrun = Path(sys.executable).with_name("torchrun")
    start = [str(Path(python()).with_name("torchrun"))] if torchrun.exists() else [python(), "-m", "torch.distributed.run"]
    return [*start, "--nproc-per-node", str(processes)]


def fresh(directory: Path) -> None:
    """Empty the directory, and mark it as the demo's.

    Raises:
        InputError: if it holds files that no demo made, or cannot be created.
    """
    try:
        if directory.exists() and any(directory.iterdir()):
            if not (directory / MARKER).exists():
                raise InputError(
                    f"--dir {directory}: it holds files that the demo did not make. Name a new directory, or remove it yourself."
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).touch()
    except OSError as error:
        raise InputError(f"--dir {directory}: cannot be made afresh ({error.strerror}). Name a directory you may write to.") from error


def answer(model: Path, questions: Sequence[str]) -> list[str]:
    """The answers of the trained weights: the greedy continuation of each question, up to the end of the document."""
    from pangu.inference.generation import TextGenerator  # not above: the stages before need no model

    generations = TextGenerator.from_directory(model).generate(
        [prompt(question) for question in questions], max_new_tokens=40, temperature=0
    )
    return [generation.text for generation in generations]


def same(one: str, other: str) -> bool:
    """Whether two texts are equal except for the tokenizer's NFKC folding (，？ become ASCII) and a final full stop."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFKC", text).strip().rstrip("。.").rstrip()

    return plain(one) == plain(other)


def report(asked: Sequence[dict[str, str]], answers: Sequence[str]) -> float:
    """Print some answers, the share of exact ones of each kind, and the mistakes; return the share of all."""
    said = {item["question"]: text for item, text in zip(asked, answers, strict=True)}
    for question in SHOWN:
        print(f"   {prompt(question)}{said[question]}")
    kinds: dict[str, list[bool]] = {}
    mistakes = []
    for item, text in zip(asked, answers, strict=True):
        exact = same(text, item["answer"])
        kinds.setdefault(item["kind"], []).append(exact)
        if not exact:
            mistakes.append(f"{item['question']} {text!r}, expected {item['answer']!r}")
    print()
    for kind, results in kinds.items():
        print(f"   {kind:<28}{sum(results):>4} of {len(results):>3}")
    for mistake in mistakes[:10]:
        print(f"   wrong: {mistake}")
    share = sum(map(sum, kinds.values())) / len(asked)
    print(f"\nanswered exactly: {len(asked) - len(mistakes)} of {len(asked)} questions, {share:.1%} ({REQUIRED_SHARE:.0%} required)")
    return share


def demo(directory: Path) -> float:
    """Run all stages; return the share of questions answered exactly."""
    corpus, tokenizer, tokens = directory / "data/corpus.txt", directory / "tokenizer", directory / "data/corpus"
    vocab_size = read_yaml(find_recipe(CONFIG))["model"]["vocab_size"]
    moved = [] if directory == Path(DIRECTORY) else [f"data.train={tokens}", f"data.tokenizer={tokenizer}", f"run.dir={directory}"]
    fresh(directory)
    with stage("Write a corpus"):
        run(python(), "-m", "pangu.quickstart.corpus", "--output", corpus.parent)
    with stage("Train a tokenizer"):
        run(python(), "-m", "pangu.train_tokenizer", "--input", corpus, "--vocab-size", str(vocab_size), "--output", tokenizer)
    with stage("Turn text into tokens"):
        run(python(), "-m", "pangu.preprocess", "--input", corpus, "--tokenizer", tokenizer, "--output", tokens)
    with stage(f"Train PanGu on {PROCESSES} tensor-parallel processes"):
        train = ["-m", "pangu.train", "--config", CONFIG, f"parallel.tensor={PROCESSES}", *moved]
        run(*launcher(PROCESSES), *train, OMP_NUM_THREADS="1")
    print()
    print_curves(read_run(directory))
    with stage("Ask the trained weights"):
        asked = [json.loads(line) for line in (corpus.parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
        share = report(asked, answer(directory / "weights", [item["question"] for item in asked]))
    print(f"\nTo ask it yourself:\n$ {python()} -m pangu.generate --model {directory}/weights --prompt {prompt(SHOWN[0])} --temperature 0")
    return share


@exit_code
def main() -> None:
    """Parse the command line and run the demo; exit with 1 if a stage fails or too few answers are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(DIRECTORY), help=f"directory for all files (default: {DIRECTORY})")
    arguments = parser.parse_args()
    directory = arguments.dir.resolve()
    directory = directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
    start = time.perf_counter()
    try:
        share = demo(directory)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"\nThe demo took {time.perf_counter() - start:.0f} s.")
    if share < REQUIRED_SHARE:
        print(f"error: {share:.1%} of the questions answered exactly, {REQUIRED_SHARE:.0%} required.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
