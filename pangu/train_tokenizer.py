"""Train a tokenizer like PanGu-α's on your own text.

    python tools/train_tokenizer.py --input a.txt b.txt --vocab-size 8000 --output tokenizer/

writes tokenizer/vocab.model, for `tools/preprocess_data.py --tokenizer tokenizer/`. The special pieces have the published ids
(0 <unk> … 8 <eod>, 9 <eot>). Input is UTF-8 text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pangu.errors import exit_code
from pangu.text.tokenizer_training import train_tokenizer


@exit_code
def main() -> None:
    """Parse the command line, train, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help="UTF-8 text files")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="total number of pieces, the ten special ones included")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory for vocab.model")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        metavar="PART",
        help="fraction of the text whose characters get a piece (default 1.0; 0.9995 where rare characters would fill the vocabulary)",
    )
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.input, arguments.vocab_size, arguments.output, character_coverage=arguments.character_coverage)
    print(f"{tokenizer.path}: {len(tokenizer):,} pieces, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    main()
