"""What the fork server imports once for all ranks of all distributed tests."""

import importlib

import torch

from pangu.engine.preload import MODULES

for module in MODULES:
    importlib.import_module(module)

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what the first optimizer would
