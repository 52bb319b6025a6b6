from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext import cross_entropy
from megatron_ext.topology import Topology
from pangu.config import Config, deepspeed_config, load_config
from pangu.planner.memory import CHUNK_LOGITS, MemoryEstimate, estimate_memory, layer_activation_bytes, model_state_bytes
from pangu.presets import num_parameters

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
    # 1F1B holds pipeline micro-batches of layers / pipeline layers on the first stage; interleaving holds a little more.
    layers_in_flight = layers * (1 + (pipeline - 1) / (pipeline * parts) if parts > 1 else 1)

    def first_stage(recompute: str, sequence_parallel: bool) -> float:
        one = layer_activation_bytes(
            micro_batch=batch,
            sequence=2048,
            hidden=hidden,
            ffn_hidden=4 * hidden,
            heads=heads,
            tensor_parallel_size=tensor,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            fused_attention=False,
        )
        return one * layers_in_flight / GIB

    assert first_stage("none", False) == pytest.approx(nothing, rel=1e-4)
    assert first_stage("selective", True) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_states(name: str) -> None:
    """They count fp32 gradients, 2 bytes more a parameter than 16-bit ones, no ZeRO, and only the large matrices."""
    (layers, hidden, _, _, tensor, pipeline, _), (_, _, published) = PUBLISHED[name]
    parameters = 12 * hidden * hidden * layers // (tensor * pipeline)
    states = model_state_bytes(parameters, zero_stage=0, precision="bf16", data_parallel_size=1)
    assert (states.weights + states.gradients + states.optimizer + 2 * parameters) / GIB == pytest.approx(published, rel=1e-4)


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
    states = model_state_bytes(1000, zero_stage=stage, precision=precision, data_parallel_size=4)
    assert states.weights + states.gradients + states.optimizer == 1000 * per_parameter


def test_uneven_shards_round_up() -> None:
    assert model_state_bytes(10, zero_stage=1, precision="bf16", data_parallel_size=4).optimizer == 12 * 3


def test_offloading_moves_states_to_the_host() -> None:
    kept = model_state_bytes(1000, zero_stage=2, precision="bf16", data_parallel_size=1, bucket_elements=10)
    moved = model_state_bytes(1000, zero_stage=2, precision="bf16", data_parallel_size=1, bucket_elements=10, offload_optimizer=True)
    assert kept.host == 0
    assert moved == replace(kept, gradients=0, optimizer=0, step=0, host=20_000)  # 20 counted live in DeepSpeed 0.19.8
    everything = model_state_bytes(
        1000, zero_stage=3, precision="bf16", data_parallel_size=1, offload_optimizer=True, offload_parameters=True
    )
    assert (everything.weights, everything.gradients, everything.optimizer, everything.host) == (0, 0, 0, 20_000)


def test_zero_3_holds_gathered_weights() -> None:
    two, three = (
        model_state_bytes(1000, zero_stage=stage, precision="bf16", data_parallel_size=8, bucket_elements=10).buffers for stage in (2, 3)
    )
    assert (two, three) == (20, 2020)


LAYER = {
    "micro_batch": 2,
    "sequence": 64,
    "hidden": 32,
    "ffn_hidden": 128,
    "heads": 4,
    "tensor_parallel_size": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "fused_attention": True,
}


def test_layer_activations_without_scores() -> None:
    assert layer_activation_bytes(**LAYER) == 34 * 2 * 64 * 32
    assert layer_activation_bytes(**LAYER | {"fused_attention": False, "recompute": "selective"}) == 34 * 2 * 64 * 32
    assert layer_activation_bytes(**LAYER | {"fused_attention": False}) == 34 * 2 * 64 * 32 + 5 * 4 * 64 * 64 * 2
    assert layer_activation_bytes(**LAYER | {"tensor_parallel_size": 4}) == (10 + 24 // 4) * 2 * 64 * 32
    assert layer_activation_bytes(**LAYER | {"ffn_hidden": 64}) == (34 - 8) * 2 * 64 * 32
    assert layer_activation_bytes(**LAYER | {"element": 4}) == 66 * 2 * 64 * 32  # dropout masks stay one byte


def test_full_recompute_keeps_the_input() -> None:
    assert layer_activation_bytes(**LAYER | {"recompute": "full"}) == 2 * 2 * 64 * 32
    split = LAYER | {"recompute": "full", "tensor_parallel_size": 4, "sequence_parallel": True}
    assert layer_activation_bytes(**split) == 2 * 2 * 64 * 32 // 4


def paper_plan(*overrides: str, stage: int = 0) -> MemoryEstimate:
    """The paper's 200B plan on 2048 devices of 32 GB: a stage of four layers, tensor 8, data 16."""
    config = load_config(RECIPES / "200B.yaml", list(overrides))
    layout = Topology(tensor=8, pipeline=16, data=16)
    parameters = num_parameters(config.model) // (8 * 16)
    return estimate_memory(config, layout, deepspeed_config(config, layout), stage=stage, num_layers=4, num_parameters=parameters)


def test_paper_plan_fits_its_devices() -> None:
    plan = paper_plan("model.attention=eager")
    states = plan.states.weights + plan.states.gradients + plan.states.optimizer
    # 1.616 billion parameters a device at 4 + 12/16 bytes; then 64 kept layer inputs of 32 MiB, 16 masks of the embedding's dropout, and
    # the rest of one layer being recomputed.
    assert states == pytest.approx(1.616e9 * (4 + 12 / 16), rel=1e-3)
    assert plan.activations / GIB == pytest.approx(2 + 16 / 64 + 16 / 64, rel=1e-3)
    assert plan.logits == 0
    assert plan.total < 0.9 * 32 * GIB


def test_the_paper_plan_needs_its_measures() -> None:
    without_recompute = paper_plan("model.attention=eager", "parallel.recompute=none")
    assert without_recompute.activations / GIB == pytest.approx(18 + 16 / 64, rel=1e-3)
    assert paper_plan("parallel.recompute=none").activations / GIB == pytest.approx(13 + 16 / 64, rel=1e-3)  # fused attention
    assert without_recompute.total > 0.8 * 32 * GIB  # too little left for the allocator and the device context
    without_zero = model_state_bytes(1_616_000_000, zero_stage=0, precision="fp16", data_parallel_size=16)
    assert without_zero.weights + without_zero.gradients + without_zero.optimizer + without_zero.step > 32 * GIB


def test_later_stages_hold_fewer_micro_batches_and_the_last_the_logits() -> None:
    first, second, last = paper_plan(), paper_plan(stage=1), paper_plan(stage=15)
    assert first.activations > second.activations > last.activations
    # Of a rank's 5000 ids in 16 bits, in fp32, and the gradient in 16 bits; then the gradients of the output layer and of its input.
    assert (second.logits, last.logits) == (0, 1024 * 5000 * (2 + 4 + 2) + 5000 * 16384 * 4 + 1024 * 16384 * 2)
    many = paper_plan("train.micro_batch_size=32", stage=15)
    assert many.logits == 2**25 * 8 + 5000 * 16384 * 4 + 32 * 1024 * 16384 * 2
    assert CHUNK_LOGITS == cross_entropy.CHUNK_LOGITS


def test_no_more_micro_batches_in_flight_than_there_are() -> None:
    one = paper_plan("train.global_batch_size=16")  # a single micro-batch a replica
    assert one.activations < paper_plan().activations / 4


def test_sequence_parallelism_divides_what_tensor_parallelism_leaves() -> None:
    assert paper_plan("parallel.sequence=true").activations == pytest.approx(((2 * 4 + 1) * 16 / 8 + (34 - 2) / 8) * 1024 * 16384, rel=1e-6)


def test_offload_is_read_from_the_deepspeed_configuration() -> None:
    config: Config = load_config(RECIPES / "350M.yaml", ["deepspeed=zero2-offload.json"])
    layout = Topology(tensor=1, pipeline=1, data=8)
    estimate = estimate_memory(
        config, layout, deepspeed_config(config, layout), stage=0, num_layers=24, num_parameters=num_parameters(config.model)
    )
    assert estimate.states.optimizer == 0
    assert estimate.states.host > 0


def test_the_peak_is_the_backward_pass_or_the_step() -> None:
    plan = paper_plan()
    states = plan.states
    resident = states.weights + states.gradients + states.optimizer + states.buffers
    assert plan.total == resident + max(plan.activations + plan.logits, states.step)
    assert replace(plan, activations=0, logits=0).total == resident + states.step
