"""Choose how to lay a model over devices, and say how far the choice can be trusted.

python tools/plan_parallel.py validate --fit runs.csv --runs other_runs.csv
python tools/plan_parallel.py validate --fit runs.csv --cross
"""

from __future__ import annotations

import argparse

from planning import calibrate, validate

from pangu.errors import exit_code

COMMANDS = {"calibrate": calibrate, "validate": validate}
"""Each is a module with `add_arguments(parser)` and `run(arguments)`."""


@exit_code
def main() -> None:
    """Parse the command line and hand over to the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary, _, rest = (command.__doc__ or "").partition("\n")
        own = commands.add_parser(
            name,
            help=summary,
            description=summary + rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(own)
    arguments = parser.parse_args()
    COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    main()
