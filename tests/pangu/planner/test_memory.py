"""The memory model against published figures, hand counts and measured runs. Against real engines: test_real_memory.py."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import cross_entropy
from megatron_ext.topology import Topology
from pangu.config import ModelConfig, load_config
from pangu.config.layout import resolve
from pangu.config.sizes import RankParameters, stage_parameters
from pangu.config.stages import balanced_layers
from pangu.planner.memory import (
    ACCELERATOR,
    CHUNK_LOGITS,
    CPU,
    MEGATRON,
    MemoryEstimate,
    estimate_memory,
    layer_activation_bytes,
    micro_batch_parts_in_flight,
)
from pangu.planner.plan import Plan, Workload, plan_of
from pangu.planner.reference import REFERENCE_RUNS
from pangu.planner.states import model_state_bytes

GIB = 2**30
RECIPES = Path(__file__).parents[3] / "ds_configs"

# The models of arXiv 2205.05198 (table 3 and figure 1): layers, hidden, heads, micro-batch, tensor, pipeline, interleaved parts of a stage;
# and the published GiB of the first stage: activations without any measure, activations with sequence parallelism and selective
# recomputation, model states.
PUBLISHED = {
    "22B": ((48, 6144, 64, 4, 8, 1, 1), (59.25, 9.5625, 45.5625)),
    "175B": ((96, 12288, 96, 1, 8, 8, 3), (66.84, 12.352, 45.5625)),
    "530B": ((105, 20480, 128, 1, 8, 35, 3), (114.02, 23.076, 31.641)),
    "1T": ((128, 25600, 160, 1, 8, 64, 1), (131.25, 26.5625, 32.959)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_activations(name: str) -> None:
    (layers, hidden, heads, batch, tensor, pipeline, parts), (nothing, both, _) = PUBLISHED[name]
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_heads=heads, max_positions=2048, attention="eager")
    workload = Workload(model, 2048, 512 * batch, "bf16")
    layout = Topology(tensor=tensor, pipeline=pipeline, data=1)
    plan = Plan(layout, batch, (layers // pipeline,) * pipeline, interleave=parts)

    def first_stage(plan: Plan) -> float:
        in_flight = micro_batch_parts_in_flight(plan, 0, plan.micro_batches(workload)) / parts
        return layer_activation_bytes(workload, plan, MEGATRON) * layers / pipeline * in_flight / GIB

    assert first_stage(plan) == pytest.approx(nothing, rel=1e-4)
    assert first_stage(replace(plan, recompute="selective", sequence_parallel=True)) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_states(name: str) -> None:
    """They count fp32 gradients, 2 bytes more a parameter than 16-bit ones, no ZeRO, and only the large matrices."""
    (layers, hidden, _, _, tensor, pipeline, _), (_, _, published) = PUBLISHED[name]
    parameters = 12 * hidden * hidden * layers // (tensor * pipeline)
    states = model_state_bytes(RankParameters((parameters,), ()), zero_stage=0, precision="bf16", data_parallel_size=1)
    assert (states.weights + states.gradients + states.optimizer + 2 * parameters) / GIB == pytest.approx(published, rel=1e-4)


KIBI = RankParameters((64,) * 16, ())


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [  # D = 4; each was counted from the live tensors of DeepSpeed 0.19.8 between two micro-batches
        (0, "fp32", 16),
        (1, "fp32", 8 + 12 / 4),
        (2, "fp32", 4 + 16 / 4),
        (3, "fp32", 20 / 4),
        (0, "bf16", 16),
        (1, "bf16", 4 + 12 / 4),
        (2, "fp16", 2 + 14 / 4),
        (3, "bf16", 16 / 4),
    ],
)
def test_zero_shards_what_its_stage_says(stage: int, precision: str, per_parameter: float) -> None:
    states = model_state_bytes(KIBI, zero_stage=stage, precision=precision, data_parallel_size=4)
    assert states.weights + states.gradients + states.optimizer == 1024 * per_parameter


def test_uneven_shards_round_up() -> None:
    # Each of two groups of 5 is padded to 8: a part has an even number of elements.
    assert model_state_bytes(RankParameters((5,), (2, 3)), zero_stage=1, precision="bf16", data_parallel_size=4).optimizer == 12 * 4


def test_offloading_moves_states_to_the_host() -> None:
    kept = model_state_bytes(KIBI, zero_stage=2, precision="bf16", data_parallel_size=1, bucket_elements=10)
    moved = model_state_bytes(KIBI, zero_stage=2, precision="bf16", data_parallel_size=1, bucket_elements=10, offload_optimizer=True)
    assert kept.host == 0
    assert moved == replace(kept, gradients=0, optimizer=0, step=0, host=20 * 1024)  # 20 counted live in DeepSpeed 0.19.8
    everything = model_state_bytes(
        KIBI, zero_stage=3, precision="bf16", data_parallel_size=1, offload_optimizer=True, offload_parameters=True
    )
    assert (everything.weights, everything.gradients, everything.optimizer, everything.host) == (0, 0, 0, 20 * 1024)


def test_zero_3_holds_gathered_weights() -> None:
    two, three = (
        model_state_bytes(KIBI, zero_stage=stage, precision="bf16", data_parallel_size=8, bucket_elements=10).buffers for stage in (2, 3)
    )
    assert (two, three) == (20, 2068)


def layer(platform: Any = ACCELERATOR, *, model: dict[str, Any] | None = None, precision: str = "bf16", **plan: Any) -> int:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 50, "max_positions": 64}
    config = ModelConfig(**sizes | (model or {}))
    tensor = plan.pop("tensor", 1)
    layout = Topology(tensor=tensor, pipeline=1, data=1)
    return layer_activation_bytes(Workload(config, 64, 2, precision), Plan(layout, 2, (2,), **plan), platform)


def test_the_published_formula_of_a_layer() -> None:
    """With the constants of Megatron-LM."""
    eager = {"attention": "eager"}
    tokens = 2 * 64
    assert layer(MEGATRON) == 34 * tokens * 32
    assert layer(MEGATRON, model=eager, recompute="selective") == 34 * tokens * 32
    assert layer(MEGATRON, model=eager) == 34 * tokens * 32 + 5 * 4 * 64 * tokens
    assert layer(MEGATRON, tensor=4) == (10 + 24 // 4) * tokens * 32
    assert layer(MEGATRON, tensor=4, sequence_parallel=True) == 34 * tokens * 32 // 4
    assert layer(MEGATRON, model={"ffn_hidden_size": 64}) == (34 - 8) * tokens * 32
    assert layer(MEGATRON, precision="fp32") == 66 * tokens * 32  # dropout masks stay one byte
    assert layer(MEGATRON, model={"hidden_dropout": 0.0}) == 32 * tokens * 32


def test_our_layers_differ_where_they_do() -> None:
    tokens, mask, statistics = 2 * 64, 2 * 64 * 64, 16 * 2 * 64
    assert layer(model={"attention": "eager"}) == 34 * tokens * 32 + statistics + 7 * 4 * 64 * tokens + mask  # probabilities in fp32
    assert layer() == 34 * tokens * 32 + statistics + 4 * 4 * tokens + 2 * mask
    assert layer(CPU) > layer(CPU, model={"attention_dropout": 0.0}) + 6 * 4 * 64 * tokens - 3 * mask - 4 * 4 * tokens
    # The gathered inputs of the column-parallel layers are kept whole.
    both = layer(tensor=4, sequence_parallel=True, recompute="selective")
    assert both == (6 // 2 * tokens * 32) // 2 + 4 * tokens * 32 + 24 * tokens * 32 // 4 + statistics // 4 + mask
    assert layer(recompute="full") == 2 * tokens * 32
    assert layer(recompute="full", tensor=4, sequence_parallel=True) == 2 * tokens * 32 // 4


def paper_plan(*overrides: str, stage: int = 0) -> MemoryEstimate:
    """The paper's 200B plan on 2048 devices of 32 GB: a stage of four layers, tensor 8, data 16."""
    config = load_config(RECIPES / "200B.yaml", ["model.attention=eager", *overrides])
    return estimate_memory(*plan_of(config, resolve(config, 2048)), stage)


def test_the_paper_plan_fits_its_devices() -> None:
    plan = paper_plan("train.precision=fp16")
    states = plan.states.weights + plan.states.gradients + plan.states.optimizer
    # 1.71 billion parameters, the embeddings among them, at 4 + 12/16 bytes.
    assert states == pytest.approx(1.71e9 * (4 + 12 / 16), rel=1e-3)
    # 64 kept layer inputs of 32 MiB, 16 masks of the embedding's dropout of half of that, and an eighth for each output that is sent.
    assert plan.activations / GIB == pytest.approx(2 + 16 / 64 + 17 / 256, rel=1e-3)
    assert plan.logits == 0
    for stage in range(16):
        assert paper_plan("train.precision=fp16", stage=stage).total < 32 * GIB


def test_the_paper_plan_needs_optimizer_parallelism() -> None:
    config = load_config(RECIPES / "200B.yaml", ["model.attention=eager", "train.precision=fp16"])
    workload, plan = plan_of(config, resolve(config, 2048))
    assert estimate_memory(workload, replace(plan, zero_stage=0), 0).total > 32 * GIB


def test_the_paper_plan_without_recomputation_is_barely_too_large() -> None:
    assert paper_plan("parallel.recompute=none").total > 32 * GIB
    assert paper_plan("parallel.recompute=none", "model.attention=sdpa").total < 1.05 * 32 * GIB


def test_later_stages_hold_fewer_micro_batches_and_the_last_the_logits() -> None:
    first, second, last = paper_plan(), paper_plan(stage=1), paper_plan(stage=15)
    assert first.activations > second.activations > last.activations
    # Of a rank's 5000 ids in 16 bits, in fp32, and the gradient in 16 bits; then the gradient of the output layer.
    assert (second.logits, last.logits) == (0, 1024 * 5000 * (2 + 4 + 2) + 5000 * 16384 * 4)
    many = paper_plan("train.micro_batch_size=32", stage=15)
    assert many.logits == CHUNK_LOGITS * 8 + 5000 * 16384 * 4
    assert CHUNK_LOGITS == cross_entropy.CHUNK_LOGITS


def test_no_more_micro_batches_in_flight_than_there_are() -> None:
    one = paper_plan("train.global_batch_size=16")  # a single micro-batch a replica
    assert one.activations < paper_plan().activations / 4


def test_offload_is_read_from_the_deepspeed_configuration() -> None:
    config = load_config(RECIPES / "350M.yaml", ["deepspeed=zero2-offload.json"])
    workload, plan = plan_of(config, resolve(config, 8))
    assert plan.offload_optimizer and not plan.offload_parameters
    estimate = estimate_memory(workload, plan, 0)
    assert estimate.states.optimizer == 0
    assert estimate.states.host > 0


def test_the_peak_is_the_backward_pass_or_the_step() -> None:
    plan = paper_plan()
    assert plan.peak == plan.states.resident + max(plan.activations + max(plan.recomputed, plan.logits), plan.states.step)
    assert replace(plan, activations=0, recomputed=0).peak == plan.states.resident + plan.states.step
    assert plan.total == plan.peak + plan.reserve
    assert plan.reserve == pytest.approx(0.1 * plan.peak + 1.5 * GIB)


def reference_runs() -> list[dict[str, str]]:
    with open(REFERENCE_RUNS, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["id"].startswith("bloom") and row["mem_gb"]]


def needed_gib(row: dict[str, str]) -> float:
    """By a run of Megatron-DeepSpeed, on its fullest stage. Its bf16 optimizer adds micro-batches up in fp32 gradients of its own."""
    model = ModelConfig(
        num_layers=int(row["layers"]),
        hidden_size=int(row["hidden"]),
        num_heads=int(row["heads"]) if int(row["hidden"]) % int(row["heads"]) == 0 else 64,
        vocab_size=int(row["vocab"]),
        max_positions=int(row["seq"]),
        attention="eager",
    )
    pipeline = int(row["pp"])
    layout = Topology(tensor=int(row["tp"]), pipeline=pipeline, data=int(row["dp"]))
    workload = Workload(model, int(row["seq"]), int(row["global_batch"]), "bf16")
    plan = Plan(layout, int(row["micro_batch"]), balanced_layers(model, pipeline), recompute=row["recompute"])  # type: ignore[arg-type]
    plan = replace(plan, bucket_elements=500_000_000)  # DeepSpeed's default
    platform = replace(ACCELERATOR, softmax_in_fp32=False)
    parameters = stage_parameters(model, layout.tensor, plan.stage_layers)
    return max(estimate_memory(workload, plan, at, platform).total + 4 * parameters[at].total for at in range(pipeline)) / GIB


def test_what_ran_is_feasible_and_what_ran_out_of_memory_is_not() -> None:
    rows = reference_runs()
    assert sum(row["mem_gb"] == "OOM" for row in rows) == 2
    errors = []
    for row in rows:
        needed = needed_gib(row)
        assert (needed > 80) == (row["mem_gb"] == "OOM"), (row["id"], row["mem_gb"], needed)
        if row["mem_gb"] != "OOM":
            errors.append(needed / float(row["mem_gb"]) - 1)
    assert len(errors) == 20
    assert min(errors) > -0.2 and max(errors) < 0.2
    assert sum(map(abs, errors)) / len(errors) < 0.1
