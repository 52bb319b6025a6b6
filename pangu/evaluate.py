"""Evaluate a model on one of the paper's tasks, or measure its perplexity on a text.

    python -m pangu.evaluate --model DIR --task cmrc2018 --data DIR --shots 3 --output results.json
    python -m pangu.evaluate --model DIR --task perplexity --data held_out.txt --output results.json
    torchrun --nproc-per-node 8 -m pangu.evaluate --model DIR --task c3 --data DIR --tensor-parallel 2 --output results.json

Writes results.json, a table in results.md and one line per example in results.jsonl. Started again after a kill, it continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from pangu.errors import InputError, exit_code


@exit_code
def main() -> None:
    """Parse the command line, evaluate and write the results."""
    from pangu.evaluation.tasks import load_tasks

    tasks = load_tasks()
    parser = argparse.ArgumentParser(
        prog="python -m pangu.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="weights of any format, with vocab.model in the same directory"
    )
    parser.add_argument("--task", required=True, choices=tasks, metavar="NAME", help=", ".join(tasks))
    parser.add_argument("--data", required=True, type=Path, metavar="PATH", help="directory of the official files, or the file to evaluate")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="number of solved examples before each question, as many as fit (default: 0)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="number of examples to evaluate, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="seed of all random choices (default: 1234)")
    parser.add_argument(
        "--score",
        choices=("suffix", "full"),
        default="suffix",
        help="compare the loss of what follows the label (default), or of the whole text",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="T", help="number of processes that share a copy of the model (default: 1)"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE.json", help="results file; a .md and a .jsonl file are written beside it"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    evaluate(parser.parse_args())


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    for name, least in (("shots", 0), ("limit", 1), ("seed", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise InputError(f"--{name} {value}: expected {least} or more.")
    if arguments.output.suffix != ".json" or not arguments.output.parent.is_dir():
        raise InputError(f"--output {arguments.output}: a name that ends in .json expected, in a directory that exists.")

    from megatron_ext.collectives import shutdown, world_rank
    from pangu.evaluation.answering import Answerer, max_new_tokens
    from pangu.evaluation.figures import figures, markdown
    from pangu.evaluation.progress import progress_bar
    from pangu.evaluation.prompts import PromptBuilder
    from pangu.evaluation.readers import read_examples
    from pangu.evaluation.runner import evaluation_order, fingerprint, run
    from pangu.evaluation.tasks import find_files, load_tasks
    from pangu.files import lock, write_durably
    from pangu.inference.generation import TextGenerator
    from pangu.inference.loading import load

    task = load_tasks()[arguments.task]
    files = find_files(task, arguments.data)
    examples = read_examples(task, files.evaluate)  # refused before the weights are read, which may take minutes
    train = read_examples(task, files.train) if arguments.shots and task.kind != "perplexity" else []
    if arguments.shots and not train:
        raise InputError(
            f"--shots {arguments.shots}: {task.name} has no training examples in {arguments.data}. Put them there, or leave it out."
        )
    with redirect_stdout(sys.stderr):  # whatever a library announces while it starts
        loaded = load(arguments.model, arguments.tensor_parallel)
    generator, config = TextGenerator(loaded.model, loaded.tokenizer), loaded.model.config
    builder = PromptBuilder(
        task,
        train,
        arguments.shots,
        arguments.score,
        arguments.seed,
        lambda text: len(generator.tokenizer.encode(text)),
        config.max_positions - (max_new_tokens(task, config.max_positions) if task.kind == "generate" else 0),
    )
    settings: dict[str, Any] = {
        "task": task.name,
        "model": str(arguments.model.resolve()),
        "weights": fingerprint(arguments.model),
        "tokenizer": generator.tokenizer.sha256,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*files.evaluate, *(files.train if train else [])]},
        "shots": arguments.shots,
        "seed": arguments.seed,
        "score": arguments.score,
    }
    order = evaluation_order(len(examples), arguments.seed, arguments.limit)
    start = time.monotonic()
    with ExitStack() as stack:
        if world_rank() == 0:
            stack.enter_context(lock(arguments.output))
        advance = stack.enter_context(progress_bar(task.name, len(order), shown=world_rank() == 0))
        answerer = Answerer(task, generator, builder, arguments.seed)
        records = run(answerer.answer, examples, order, loaded.groups, arguments.output.with_suffix(".jsonl"), settings, advance)
        if world_rank() == 0:
            results = {
                **settings,
                "figures": figures(task, records, arguments.seed, config.vocab_size),
                "paper": task.paper,
                "examples": len(records),
                "examples_in_files": len(examples),
                "shots_used": sum(record["shots"] for record in records) / len(records),
                "examples_cut": sum(record["cut"] for record in records),
                "seconds": round(time.monotonic() - start, 3),
            }
            write_durably(arguments.output.with_suffix(".md"), markdown(task, results))
            write_durably(arguments.output, json.dumps(results, ensure_ascii=False, indent=2) + "\n")
            print(markdown(task, results), end="")
    shutdown()


if __name__ == "__main__":
    main()
