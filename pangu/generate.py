"""Continue texts.

    python -m pangu.generate --model runs/quickstart/weights --prompt 四川的省会是? --temperature 0
    python -m pangu.generate --model DIR --prompt 上联:瑞风播福泽 --top-p 0.9 --temperature 0.8 --seed 7
    python -m pangu.generate --model DIR --prompt-file prompts.txt --json
    python -m pangu.generate --model DIR --interactive
    torchrun --nproc-per-node 4 -m pangu.generate --model DIR --prompt TEXT --prompt TEXT --json

Prints the continuation of each prompt, without the prompt. Under torchrun the model is split over the processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.errors import InputError, exit_code
from pangu.files import read_bytes

if TYPE_CHECKING:
    from megatron_ext.topology import Group
    from pangu.inference.generation import TextGenerator

STANDARD_INPUT = "-"
MAX_PROMPT_BYTES = 2**28
"""Largest file of prompts."""


@exit_code
def main() -> None:
    """Parse the command line, generate and print."""
    arguments = _parser().parse_args()

    from megatron_ext.collectives import shutdown, world_rank
    from pangu.inference.generation import TextGenerator
    from pangu.inference.sampling import Sampling

    sampling = {name: getattr(arguments, name) for name in vars(Sampling())}
    Sampling(**sampling)  # refuses before the weights are read, which may take minutes
    for name in ("batch_size", "num_samples"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected 1 or more.")
    if arguments.interactive and (arguments.json or arguments.num_samples > 1):
        raise InputError("--interactive prints one text as it is generated: leave out --json and --num-samples.")
    prompts = arguments.prompt or []
    if arguments.prompt_file not in (None, STANDARD_INPUT):
        prompts = parse_lines(arguments.prompt_file, _read(arguments.prompt_file))
    with redirect_stdout(sys.stderr):  # standard output is the text's alone, whatever a library announces while it starts
        generator = TextGenerator.from_directory(arguments.model, int8=arguments.int8)
    group, first = generator.model.context.tensor, world_rank() == 0
    if arguments.prompt_file == STANDARD_INPUT:
        prompts = parse_lines("standard input", _from_first(lambda: _read(STANDARD_INPUT), group))
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "num_samples": arguments.num_samples,
        "seed": arguments.seed,
        "stop": arguments.stop,
        "stop_ids": arguments.stop_id,
        "truncate_prompts": arguments.truncate_prompt,
        **sampling,
    }
    ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")  # JSON is UTF-8, or else it escapes what is not ASCII
    if arguments.interactive:
        _converse(generator, group, first, options)
    for begin in range(0, len(prompts), arguments.batch_size):
        batch = prompts[begin : begin + arguments.batch_size]
        generations = generator.generate(batch, **options)
        for number, generation in enumerate(generations if first else []):
            if arguments.json:
                shown = {name: value for name, value in vars(generation).items() if name != "logprobs" or arguments.logprobs}
                print(json.dumps({"prompt": batch[number // arguments.num_samples], **shown}, ensure_ascii=ascii_only), flush=True)
            else:
                print(generation.text, flush=True)
    shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pangu.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="weights of any format, with vocab.model in the same directory"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help='text to continue; may be repeated; "" begins a document')
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='one prompt per line, in UTF-8; - is standard input. A line that begins with " is a JSON string, which may hold line breaks',
    )
    source.add_argument("--interactive", action="store_true", help="continue each typed line, printed as it is generated; Ctrl-D ends")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of a continuation (default: 100, or what fits into the model's window)"
    )
    parser.add_argument(
        "--truncate-prompt", action="store_true", help="drop the beginning of a prompt that is too long instead of refusing it"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divides the logits; 0 = greedy, always the most likely token (default: 1)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0 = all (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens of total probability P; 1 = all (default)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="factor for tokens in the prompt or the continuation; 1 = none (default)",
    )
    parser.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="F",
        help="subtracted from a token's logit per occurrence in the continuation; 0 = none (default)",
    )
    parser.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="F",
        help="subtracted once if the token occurs in the continuation; 0 = none (default)",
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this string; may be repeated")
    parser.add_argument(
        "--stop-id", type=int, action="append", metavar="ID", help="end at this token instead of the separator <eot>; may be repeated"
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="number of continuations per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="the same seed gives the same text (default: 1234)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts computed at once (default: 8)")
    parser.add_argument("--int8", action="store_true", help="8-bit weights: faster, slightly less exact; one process on a CPU")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line: prompt, text, ids, finish_reason (stop or length)"
    )
    parser.add_argument("--logprobs", action="store_true", help="with --json: also logprobs, one per token")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _read(path: str) -> str:
    """A text file, or standard input. Raises InputError if it cannot be read."""
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else read_bytes(Path(path), MAX_PROMPT_BYTES)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompt-file {path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {path}: byte {error.start:,} is not UTF-8. Convert it, for instance with iconv.") from None
    except ValueError as error:
        raise InputError(f"--prompt-file {path}: {error}. Split it.") from None


def parse_lines(name: str, text: str) -> list[str]:
    """The prompts in a text, one per line; empty lines are skipped.

    A line that begins with a double quote is a JSON string: so a prompt may hold line breaks, begin with a quote, or be empty.

    Raises:
        InputError: if a line begins with a quote and is not a JSON string, or there is no prompt.
    """
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.startswith('"'):
            try:
                prompts.append(json.loads(line))
            except ValueError:
                raise InputError(
                    f"{name}, line {number}: begins with a double quote and is not a JSON string. Write a prompt that begins with one as "
                    r'"\"...".'
                ) from None
        elif line:
            prompts.append(line)
    if not prompts:
        raise InputError(f"{name}: no prompt found. Write one per line.")
    return prompts


def _from_first(ask: Callable[[], Any], group: Group) -> Any:
    """The result of `ask` on the group's first process, on all processes: there is only one standard input."""
    from megatron_ext.collectives import broadcast_object

    return broadcast_object(ask() if group.rank == 0 else None, group)


def _converse(generator: TextGenerator, group: Group, first: bool, options: dict[str, Any]) -> None:
    """Continue each line of standard input until it ends. For a line that is refused the error is printed."""

    def show(_: int, piece: str) -> None:
        print(piece, end="", flush=True)

    while (line := _from_first(_next_line, group)) is not None:
        try:
            for prompt in parse_lines("the line", line) if line else []:
                generator.generate([prompt], on_text=show if first else None, **options)
        except InputError as error:
            if first:
                print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            if first:
                print(flush=True)


def _next_line() -> str | None:
    """The next line of input, or None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


if __name__ == "__main__":
    main()
