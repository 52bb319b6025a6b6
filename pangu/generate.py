"""Continue a text.

    python -m pangu.generate --model runs/quickstart/weights --prompt 四川的省会是? --temperature 0
    python -m pangu.generate --model DIR --prompt 上联:瑞风播福泽 --top-p 0.9 --temperature 0.8 --seed 7
    torchrun --nproc-per-node 4 -m pangu.generate --model DIR --prompt TEXT --prompt TEXT --json

Prints the continuation of each prompt, without the prompt. Under torchrun the model is split over the processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from pangu.errors import exit_code


@exit_code
def main() -> None:
    """Parse the command line, generate and print."""
    parser = argparse.ArgumentParser(
        prog="python -m pangu.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="weights of any format with their vocab.model beside them")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help='may be repeated; "" begins a document')
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 100, or what the prompt leaves of the model's window")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 = greedy: always the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0 = all (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of total probability P; 1 = all (default)"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="the same seed gives the same text (default: 1234)")
    parser.add_argument("--json", action="store_true", help="one object a line: prompt, text, ids, finish_reason (stop or length)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()

    from megatron_ext.collectives import shutdown, world_rank
    from pangu.inference.generation import TextGenerator
    from pangu.inference.sampling import Sampling

    Sampling(arguments.temperature, arguments.top_k, arguments.top_p)  # refuses before the weights are read, which may take minutes
    with redirect_stdout(sys.stderr):  # standard output is the text's alone, whatever a library announces while it starts
        generator = TextGenerator.from_directory(arguments.model)
    generations = generator.generate(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if world_rank() == 0:
        for prompt, generation in zip(arguments.prompt, generations, strict=True):
            print(json.dumps({"prompt": prompt, **vars(generation)}, ensure_ascii=False) if arguments.json else generation.text)
    shutdown()


if __name__ == "__main__":
    main()
