"""From a training checkpoint of tensor x pipeline ranks to transformers: its logits are the trainer's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness import run_distributed
from helpers.layouts import SEQUENCE, VOCAB, random_batches, small_config, start

from megatron_ext.collectives import all_gather_objects
from pangu.engine.engine import _pipeline_batch
from pangu.model.model import gather_logits
from pangu.training.checkpoint import Progress, save_checkpoint

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def trained(directory: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train five steps and save; tokens, positions, and the logits of the trainer's own forward pass for them."""
    config = small_config(parallel={"tensor": 2, "pipeline": 2}, checkpoint={"dir": f"{directory}/checkpoints"}, data={"eod_reset": False})
    engine = start(config)
    batches = random_batches(config, engine.groups)
    for _ in range(5):
        engine.train_step(batches, 1e-2)
    save_checkpoint(engine, Progress(step=5))
    batch = next(random_batches(config, engine.groups, first_step=9))
    engine.module.eval()
    engine.engine.total_loss, engine.engine.fwd_outputs = None, []
    outputs: Any = engine.engine.eval_batch(iter([_pipeline_batch(batch)]), compute_loss=False, reduce_output=None, num_micro_batches=1)
    logits = None
    if outputs:
        logits = engine.module.tied_modules["words"].logits(outputs[0]).detach()
        logits = gather_logits(logits, vocab_size=VOCAB, group=engine.groups.tensor)
    found = [value for value in all_gather_objects(logits, engine.groups.world) if value is not None]
    return batch.tokens, batch.position_ids, found[0]


def test_the_converted_checkpoint_has_the_trainers_logits(tmp_path: Path) -> None:
    tokens, position_ids, expected = run_distributed(trained, 4, str(tmp_path / "run"))[0]
    assert expected.shape == (2, SEQUENCE, VOCAB)
    tool = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), "--to", "huggingface"]
    command = [*tool, "--input", str(tmp_path / "run/checkpoints"), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    # In a process of its own, without this project: transformers loads the code that lies beside the weights.
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "tokens, positions = torch.load(sys.argv[2]); torch.save(model(tokens, position_ids=positions).logits.detach(), sys.argv[3])"
    )
    torch.save((tokens, position_ids), tmp_path / "tokens.pt")
    words = [sys.executable, "-c", script, *map(str, (tmp_path / "out", tmp_path / "tokens.pt", tmp_path / "logits.pt"))]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path)}
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (found - expected).abs().max() < 5e-5
    assert expected.std() > 0.1  # it has learnt something to compare
