"""What the fork server does once for all ranks of all distributed tests."""

import gc
import importlib

import torch
from deepspeed.ops import __compatible_ops__  # noqa: F401  (found by running a compiler, in every rank that finds it missing)

from pangu.engine.preload import MODULES

# The second line: what a rank imports as it starts, steps for the first time, or shards its parameters.
LATER = ("helpers.layouts", "megatron_ext.supervision.rendezvous", "torch._subclasses.schema_check_mode", "torch.profiler._cupti_monitor")
for module in (*MODULES, *LATER):
    importlib.import_module(module)

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what the first optimizer would
gc.collect()
gc.freeze()  # or every rank would look through all these modules again, and so copy their memory
