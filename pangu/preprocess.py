"""Tokenize text files into a data set for training.

    python tools/preprocess_data.py --input corpus.txt more.jsonl.zst --tokenizer TOKENIZER_DIR --output data/corpus

writes data/corpus.bin, data/corpus.idx and data/corpus.json; `data.train` in a run's configuration then names data/corpus.
In a .txt, documents are separated by blank lines; a .jsonl has one object per line. Both may be compressed (.gz, .zst).
The result does not depend on --workers.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from types import FrameType

from pangu.data.preprocess import preprocess
from pangu.errors import exit_code
from pangu.text.tokenizer import PanguTokenizer


def positive(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} found, 1 or more expected")
    return number


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, or these with .gz or .zst")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="directory of the tokenizer")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the data set without suffix")
    parser.add_argument(
        "--workers", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="number of processes (default: all processors)"
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key of the text in a .jsonl (default: text)")
    return parser.parse_args()


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Make SIGTERM end the program as Ctrl-C does."""
    raise KeyboardInterrupt


@exit_code
def main() -> None:
    """Run the program."""
    args = arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        summary = preprocess(args.input, PanguTokenizer(args.tokenizer), args.output, workers=args.workers, json_key=args.json_key)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing was written.") from None
    print(
        f"{summary.documents:,} documents ({summary.empty:,} empty ones left out), {summary.tokens:,} tokens in {summary.seconds:.1f} s "
        f"({summary.tokens / summary.seconds:,.0f} tokens/s): {', '.join(map(str, summary.files))}"
    )


if __name__ == "__main__":
    main()
