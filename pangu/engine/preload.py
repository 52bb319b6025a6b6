"""Imports what a training engine imports when it is built. A fork server imports this once for all of its ranks, which then start
quickly."""

from __future__ import annotations

MODULES = (
    "deepspeed.pipe",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "torch._dynamo",
    "torch.utils.checkpoint",
    "pangu.engine.engine",
)
