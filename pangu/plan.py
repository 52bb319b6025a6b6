"""Choose the parallel layout of a model on a cluster: what fits, how long a step takes, and why.

python tools/plan_parallel.py --model 200B --cluster ascend910_2048 --global-batch-size 2048
python tools/plan_parallel.py --model 13B --cluster a100_80 --devices 64 --write my_13B.yaml
python tools/plan_parallel.py calibrate --output profile.yaml      # measure this machine
python tools/plan_parallel.py measure --model ds_configs/quickstart.yaml --profile profile.yaml      # really run some plans here
python tools/plan_parallel.py validate --cross      # how far predictions can be trusted
"""

from __future__ import annotations

import argparse
import sys

from pangu.calibration import calibrate_command, measure_command
from pangu.errors import exit_code
from pangu.planner import plan_command, validate_command

COMMANDS = {"plan": plan_command, "calibrate": calibrate_command, "measure": measure_command, "validate": validate_command}
"""By name, modules with `add_arguments(parser)` and `run(arguments)`. `plan` is the default."""


@exit_code
def main() -> None:
    """Parse the command line and run the command."""
    name, *words = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in COMMANDS else ["plan", *sys.argv[1:]]
    command = COMMANDS[name]
    others = "" if name != "plan" else f"\nOther commands, each with a --help: {', '.join(COMMANDS)}."
    parser = argparse.ArgumentParser(
        prog=f"plan_parallel.py{f' {name}' if name != 'plan' else ''}",
        description=(command.__doc__ or "") + others,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    command.run(parser.parse_args(words))


if __name__ == "__main__":
    main()
