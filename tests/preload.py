"""What the fork server imports once for all ranks of all distributed tests."""

import deepspeed.pipe
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.pipe.engine
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
import torch._dynamo
import torch.utils.checkpoint

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what the first optimizer would
