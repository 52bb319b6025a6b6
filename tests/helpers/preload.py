"""What the fork server imports once for all ranks of all distributed tests."""

import importlib

import torch

for module in (
    "deepspeed.pipe",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "torch._dynamo",
    "torch.utils.checkpoint",
    "pangu.engine.engine",
):
    importlib.import_module(module)

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what the first optimizer would
