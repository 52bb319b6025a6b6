"""A process of `workers`: builds what it is told to, then takes a step whenever a line comes in, and answers how it went.

    python -m pangu.benchmarks.worker PROGRAM ALLOCATOR CONFIG

An answer is a line of JSON: seconds and loss of the step, and the peak of memory so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

import torch

from megatron_ext import accelerator
from megatron_ext.context import ParallelContext
from megatron_ext.initialize import random_weights
from megatron_ext.supervision import rendezvous
from megatron_ext.topology import Groups
from pangu.benchmarks import turns
from pangu.benchmarks.machine import memory
from pangu.calibration.trial import random_batches
from pangu.config import Config
from pangu.config.layout import resolve
from pangu.engine.engine import TrainingEngine
from pangu.engine.optimizer import build_optimizer
from pangu.errors import InputError, exit_code
from pangu.model.model import PanguModel

Step = Callable[[int], float]
"""Takes the optimizer step of this number and returns its loss, which waits for the device."""


def engine(config: Config) -> Step:
    """A step as `pangu.train` takes it."""
    layout = resolve(config, int(os.environ["WORLD_SIZE"]))
    groups = Groups.create(layout.topology, 600.0)
    trainer = TrainingEngine(config, layout, groups, random_weights(config.train.seed))
    place = groups.coordinates

    def step(number: int) -> float:
        return trainer.train_step(random_batches(config, groups.topology.data, place.data, number), config.optimizer.lr).loss

    return step


def bare(config: Config) -> Step:
    """Our model without the engine."""
    model = PanguModel(config.model, ParallelContext(device=accelerator.device(), fill=random_weights(config.train.seed)))
    optimizer, _ = build_optimizer(config.optimizer, model.parameters(), offload=False)
    return plain_loop(config, model, optimizer, lambda batch: model(*batch))


def gpt2(config: Config) -> Step:
    """transformers' GPT-2 of equal shape."""
    torch.manual_seed(config.train.seed)
    model = turns.gpt2(config.model).to(accelerator.device())
    return plain_loop(
        config, model, fused_adamw(config, model), lambda batch: model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
    )


def megatron(config: Config) -> Step:
    """megatron-core's GPT of equal shape with its local layers, those that need neither Transformer Engine nor apex."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.parallel_state import initialize_model_parallel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = config.model
    initialize_model_parallel()
    model_parallel_cuda_manual_seed(config.train.seed)
    settings = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
    )
    model = GPTModel(settings, get_gpt_layer_local_spec(), shape.vocab_size, shape.max_positions, share_embeddings_and_output_weights=True)
    model = model.to(accelerator.device())

    def loss_of(batch: list[torch.Tensor]) -> torch.Tensor:
        tokens, position_ids, labels, loss_mask = batch
        mask = torch.ones(1, 1, *tokens.shape[-1:] * 2, dtype=torch.bool, device=tokens.device).triu(1)  # true: not seen
        losses = model(tokens, position_ids, mask, labels=labels)
        return (losses * loss_mask).sum() / loss_mask.sum()

    return plain_loop(config, model, fused_adamw(config, model), loss_of)


def fused_adamw(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's, with the settings of the run."""
    own = config.optimizer
    return torch.optim.AdamW(model.parameters(), lr=own.lr, betas=own.betas, eps=own.eps, weight_decay=own.weight_decay, fused=True)


def plain_loop(
    config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Step:
    """A step as a short script of PyTorch would take it.

    Args:
        config: the run.
        model: to train.
        optimizer: of its parameters.
        loss_of: of a micro-batch: tokens, position ids, labels and loss mask, on the device.
    """
    model.train()
    if config.train.compile:
        model.compile()
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size

    def step(number: int) -> float:
        source = random_batches(config, 1, 0, number)
        losses = []
        for _ in range(micro_batches):
            batch = next(source)
            inputs = [x.to(accelerator.device()) for x in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)]
            half = config.train.precision == "bf16"
            with torch.autocast(accelerator.name(), torch.bfloat16) if half else contextlib.nullcontext():
                loss = loss_of(inputs) / micro_batches
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(losses))

    return step


PROGRAMS: dict[str, Callable[[Config], Step]] = {"engine": engine, "bare": bare, "gpt2": gpt2, "megatron": megatron}


@exit_code
def main() -> None:
    """Build, then answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    program, allocator, settings = sys.argv[1:]
    config = Config.model_validate(json.loads(settings))
    if allocator == "kept":
        accelerator.keep_freed_memory()
    if not accelerator.supports(config.train.precision):
        raise InputError(f"train.precision={config.train.precision}: {accelerator.device_name()} does not train in it. Choose fp32.")
    rendezvous.initialize(600.0)
    step = PROGRAMS[program](config)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        loss = step(number)
        accelerator.synchronize()
        seconds = time.perf_counter() - began
        peak_bytes = accelerator.max_memory_allocated() or memory()["VmHWM"]
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes}), file=answers, flush=True)


if __name__ == "__main__":
    main()
