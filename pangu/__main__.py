"""The command `pangu VERB ...`: one table of the project's programs. `python -m pangu` does the same."""

from __future__ import annotations

import importlib
import sys

from pangu.errors import exit_code

VERBS = {
    "train": ("pangu.train", "pretrain or continue a model; under torchrun or deepspeed: -m pangu.train"),
    "generate": ("pangu.generate", "continue texts"),
    "evaluate": ("pangu.evaluate", "evaluate a model on a task"),
    "convert": ("pangu.convert", "convert weights from any format into another"),
    "inspect": ("pangu.inspect_checkpoint", "show what a checkpoint is, and what is wrong with it"),
    "preprocess": ("pangu.preprocess", "tokenize text files for training"),
    "tokenizer": ("pangu.train_tokenizer", "train a tokenizer"),
    "plan": ("pangu.plan", "choose the parallel layout of a model on a cluster"),
    "plot": ("pangu.plot", "draw the loss of runs"),
    "benchmark": ("pangu.benchmark", "measure speed and memory on this machine"),
    "supervise": ("pangu.supervise", "restart a training command when it crashes"),
    "demo": ("pangu.demo", "train a tiny model from scratch and ask it questions, in a few minutes on two CPU cores"),
}
"""By verb: the module whose `main` it runs, and a summary. A module is imported when its verb is used."""


@exit_code
def main() -> None:
    """Run the program named by the first argument; without one, or with --help, print the table. An unknown verb exits with 2."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: pangu VERB ...\n")
        print("\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items()))
        print("\n`pangu VERB --help` lists the options of each; `pangu --version` prints the version.")
    elif verb == "--version":
        from pangu import __version__

        print(f"pangu {__version__}")
    elif verb in VERBS:
        sys.argv[:2] = [f"pangu {verb}"]
        importlib.import_module(VERBS[verb][0]).main()
    else:
        print(f"error: pangu {verb}: unknown. Choose one of {', '.join(VERBS)}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
