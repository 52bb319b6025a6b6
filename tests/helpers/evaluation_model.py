"""A small model and a tokenizer that knows every character of tests/data, for tests that evaluate."""

from __future__ import annotations

from pathlib import Path

from helpers.small_model import write_model
from pangu.text.tokenizer_training import train_tokenizer

DATA = Path(__file__).parents[1] / "data"
TASKS = sorted(path.name for path in DATA.iterdir())


def write_evaluation_model(folder: Path, max_positions: int = 96) -> Path:
    """Write it to `folder`/weights, which is returned."""
    texts = [path.read_text("utf-8") for path in sorted(DATA.rglob("*")) if path.is_file()]
    (folder / "corpus.txt").write_text("\n".join(texts), "utf-8")
    tokenizer = train_tokenizer([folder / "corpus.txt"], 700, folder / "tokenizer")
    write_model(folder / "weights", tokenizer.path, vocab_size=700, max_positions=max_positions)
    return folder / "weights"
