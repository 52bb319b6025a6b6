import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import LayoutError
from megatron_ext.topology import Topology
from pangu.config import Config, foreign_names, load_config
from pangu.config.foreign_names import FOREIGN_NAMES
from pangu.config.layout import resolve
from pangu.config.load import nearest_keys
from pangu.errors import InputError

BASE = """\
model:
  preset: "2.6B"
train:
  global_batch_size: 16
  steps: 100
data:
  train: data/corpus
run:
  dir: runs/a
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write a YAML text, and with it a DeepSpeed JSON, and load them."""

    def load(text: str = BASE, *overrides: str, deepspeed: Any = None) -> Config:
        path = tmp_path / "config.yaml"
        if deepspeed is not None:
            (tmp_path / "ds.json").write_text(deepspeed if isinstance(deepspeed, str) else json.dumps(deepspeed))
            text += "deepspeed: ds.json\n"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises((InputError, LayoutError)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading ---------------------------------------------------------------------------------------------------------------------------------


def test_preset_fills_what_is_not_given(write) -> None:
    model = write(BASE, "model.num_layers=4").model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.ffn_hidden_size) == (4, 2560, 32, 10240)


def test_derived_values_follow_their_sources(write) -> None:
    config = write(BASE, "model.max_positions=64", "train.sequence_length=null", "checkpoint.dir=null")
    assert config.train.sequence_length == 64
    assert config.schedule.decay_steps == 100
    assert config.checkpoint_dir == Path("runs/a/checkpoints")
    again = write(BASE, "train.steps=7")  # a default section is shared between configurations: it must not keep the 100
    assert again.schedule.decay_steps == 7


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),  # a string in YAML 1.1
        ("optimizer.betas=[0.9, 0.95]", "optimizer", "betas", (0.9, 0.95)),
        ("data.train=[a, b]", "data", "train", ["a", "b"]),
        ("data.eod_reset=false", "data", "eod_reset", False),
        ("run.dir=2024-01-02", "run", "dir", Path("2024-01-02")),  # a date in YAML
        ("checkpoint.resume=runs/b/checkpoints/global_step4", "checkpoint", "resume", "runs/b/checkpoints/global_step4"),
        ("checkpoint.init_from=null", "checkpoint", "init_from", None),
    ],
)
def test_overrides_are_yaml_values(write, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(write(BASE, override), section), key) == value


def test_later_overrides_win(write) -> None:
    assert write(BASE, "train.steps=5", "train.steps=6").train.steps == 6


def test_empty_section_means_its_defaults(write) -> None:
    assert write(BASE + "checkpoint:\noptimizer:\n").checkpoint.keep == 2


def test_resolved_yaml_loads_back_equal(write, tmp_path: Path) -> None:
    config = write(
        BASE, "optimizer.lr=3e-4", "data.train=[数据/甲, b]", "data.weights=[1, 2]", deepspeed={"zero_optimization": {"stage": 2}}
    )
    resolved = tmp_path / "elsewhere" / "config.yaml"
    resolved.parent.mkdir()
    resolved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(resolved)
    assert again == config
    assert again.parallel.zero_stage == 2
    assert "数据/甲" in resolved.read_text(encoding="utf-8")


def test_frozen(write) -> None:
    with pytest.raises(ValueError, match="frozen"):
        write().train.steps = 3


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (BASE, ["train.step=5"], "override: unknown key train.step. Nearest: train.steps"),
        (BASE, ["train.lr=5"], "unknown key train.lr. Nearest: optimizer.lr."),
        (BASE, ["parallel.tensor=true"], "override: parallel.tensor = True: input should be a valid integer"),
        (BASE, ["trian.steps=5"], "override: unknown key trian. Nearest: train."),
        (BASE, ["model.micro_batch_size=5"], "override: unknown key model.micro_batch_size. Nearest: train.micro_batch_size."),
        (BASE, ["seed=5"], "override: unknown key seed. Nearest: train.seed."),
        (BASE, ["train.learning_rate=5"], "override: unknown key train.learning_rate. Nearest: optimizer.lr."),
        (BASE, ["learning_rate=5"], "override: unknown key learning_rate. Nearest: optimizer.lr."),
        (BASE, ["tp-size=2"], "override: unknown key tp-size. Nearest: parallel.tensor."),
        (BASE, ["fp16.enabled=true"], "override: unknown key fp16. Nearest: train.precision=fp16."),
        (BASE, ["train.warmup_ration=0.1"], "Nearest: schedule.warmup_steps"),
        (BASE + "fp16:\n  enabled: true\n", [], "config.yaml: unknown key fp16. Nearest: train.precision=fp16."),
        (BASE + "learning_rate: 1e-4\n", [], "config.yaml: unknown key learning_rate. Nearest: optimizer.lr."),
        (BASE.replace("steps:", "train_iters:"), [], "config.yaml: unknown key train.train_iters. Nearest: train.steps. (and 1 more)"),
        (BASE, ["train.zzz=5"], "Nearest: train.micro_batch_size, train.global_batch_size, train.steps"),
        (BASE, ["train.steps"], "override 'train.steps': section.key=value is expected"),
        (BASE, ["run.dir.x=3"], "override 'run.dir.x=3': dir is not a section"),
        (BASE, ["train.steps=many"], "override: train.steps = 'many': input should be a valid integer"),
        (BASE, ["train.steps=0"], "override: train.steps = 0: input should be greater than or equal to 1"),
        (BASE, ["optimizer.lr=.nan"], "optimizer.lr = nan: "),
        (BASE, ["parallel.recompute=some"], "parallel.recompute = 'some': input should be 'none', 'selective' or 'full'"),
        (BASE, ["model.preset=3B"], "model.preset = '3B': input should be '350M', '2.6B', '13B' or '200B'"),
        (BASE, ["model.num_heads=33"], "model.num_heads = 33 does not divide model.hidden_size = 2560"),
        (BASE, ["model.vocab_size=9"], "model.separator_id = 9 is not below model.vocab_size = 9"),
        (BASE, ["data.weights=[1, 2]"], "data.weights has 2 values for 1 data sets"),
        (BASE, ["data.train=[]"], "data.train = []: list should have at least 1 item"),
        (BASE, ["train.eval_every=5"], "data.validation_fraction"),
        (BASE, ["train.on_bad_step=rollback"], "train.on_bad_step = rollback but checkpoint.save_every = 0"),
        (BASE, ["train.spike_factor=1"], "train.spike_factor = 1.0 would make half of all steps spikes"),
        (BASE, ["train.sequence_length=2048"], "train.sequence_length = 2048 is more than model.max_positions = 1024"),
        (BASE, ["schedule.min_lr=1"], "schedule.min_lr = 1.0 is above optimizer.lr = 0.0001"),
        (BASE, ["train=3"], "train = 3, but a section of keys is expected"),
        (BASE.replace("  steps: 100\n", ""), [], "config.yaml: train.steps is missing."),
        (BASE.replace('preset: "2.6B"', "num_layers: 2"), [], "model.hidden_size is missing. Or give model.preset: 350M, 2.6B"),
        (BASE.replace("steps:", "stepps:"), [], "unknown key train.stepps. Nearest: train.steps, "),
        (BASE + "train:\n  steps: 3\n", [], "config.yaml: line 10: the key 'train' is there twice"),
        (BASE + "  dir: runs/b\n", [], "config.yaml: line 10: the key 'dir' is there twice"),
        (BASE + "  log_every: [1\n", [], "config.yaml: line 11: "),
        (BASE + "  tensorboard: !!python/name:os.system x\n", [], "config.yaml: line 10: "),
        ("", [], "found nothing"),
        ("- a\n", [], "found ['a']"),
        ("a\x00b", [], "config.yaml: "),
    ],
)
def test_refused_with_one_line(write, text: str, overrides: list[str], expected: str) -> None:
    assert expected in refusal(write, text, *overrides)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("learning_rate", "optimizer.lr"),
        ("gradient_accumulation_steps", "train.global_batch_size = train.micro_batch_size x accumulation steps x data-parallel size"),
        ("tp_size", "parallel.tensor"),
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("pipe_parallel_size", "parallel.pipeline"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        ("seq_length", "train.sequence_length"),
        ("n_layer", "model.num_layers"),
        ("num_hidden_layers", "model.num_layers"),
        ("intermediate_size", "model.ffn_hidden_size"),
        ("weight_decay", "optimizer.weight_decay"),
        ("adam_beta1", "optimizer.betas=[beta1, beta2]"),
        ("max_steps", "train.steps"),
        ("train_iters", "train.steps"),
        ("warmup_ratio", "schedule.warmup_steps, a number of steps"),
        ("bf16", "train.precision=bf16"),
        ("save_interval", "checkpoint.save_every"),
    ],
)
def test_names_of_other_programs_lead_to_ours(write, name: str, ours: str) -> None:
    """In any section or none, in a file or on the command line, with dashes or underscores."""
    for key in (name, f"run.{name}", f"model.{name}", name.replace("_", "-")):
        assert refusal(write, BASE, f"{key}=1") == f"override: unknown key {key}. Nearest: {ours}."
    assert nearest_keys(f"--{name.replace('_', '-')}") == [ours]


def test_the_table_of_foreign_names_leads_to_keys_that_exist() -> None:
    keys = {f"{name}.{key}" for name, field in Config.model_fields.items() for key in getattr(field.annotation, "model_fields", ())}
    for name, ours in FOREIGN_NAMES.items():
        assert name == name.lower() and "-" not in name
        assert ours == "deepspeed" or (set(re.findall(r"[a-z]+\.[a-z_]+", ours)) <= keys and "." in ours), ours
        assert name not in {key.partition(".")[2] for key in keys}, f"{name} is a name of ours: its line is never read"
    assert sum(len(names.split()) for names in foreign_names._NAMES.values()) == len(FOREIGN_NAMES)  # none twice


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "no.yaml: cannot be read (No such file or directory)" in refusal(load_config, tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in refusal(load_config, tmp_path / "bytes.yaml")
    (tmp_path / "config.yaml").write_text(BASE + "deepspeed: gone.json\n")
    assert f"{tmp_path / 'gone.json'}: cannot be read" in refusal(load_config, tmp_path / "config.yaml")


def test_import_is_light() -> None:
    code = "import sys, pangu.config; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Layout ----------------------------------------------------------------------------------------------------------------------------------


def test_layout_is_the_world_divided(write) -> None:
    config = write(BASE, "parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=2")
    layout = resolve(config, 8)
    assert layout.topology == Topology(tensor=2, pipeline=2, data=2)
    assert (layout.micro_batches, layout.stage_layers) == (4, (16, 16))
    stages_nearer = write(BASE, "parallel.pipeline=2", "parallel.order=tp-pp-dp", "parallel.stage_layers=[1,31]")
    assert resolve(stages_nearer, 8).topology == Topology(tensor=1, pipeline=2, data=4, order="tp-pp-dp")


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (6, ["parallel.tensor=6"], "parallel.tensor = 6 does not divide model.num_heads = 32 (preset 2.6B). Choose 1, 2, 4, 8, 16 or 32."),
        (3, ["parallel.tensor=3", "model.num_heads=40"], "parallel.tensor = 3 does not divide model.num_heads = 40. Choose 1, 2, 4, 5,"),
        (8, ["parallel.tensor=8", "model.ffn_hidden_size=1004"], "does not divide model.ffn_hidden_size = 1004. Choose 1, 2 or 4."),
        (4, ["parallel.pipeline=4", "model.num_layers=3"], "parallel.pipeline = 4 is more stages than model.num_layers = 3. Choose 3 or"),
        (64, ["parallel.pipeline=64"], "more stages than model.num_layers = 32 (preset 2.6B)"),
        (2, ["parallel.pipeline=2", "parallel.stage_layers=[32]"], "[32] has 1 stages, but parallel.pipeline = 2. Make the two agree."),
        (2, ["parallel.pipeline=2", "parallel.stage_layers=[16,15]"], "has 31 layers, but model.num_layers = 32 (preset 2.6B)."),
        (6, ["parallel.tensor=4"], "6 is not a multiple of 4 x 1 = 4"),
        (2, ["parallel.pipeline=2", "parallel.zero_stage=2"], "Set parallel.zero_stage=1, or parallel.pipeline=1."),
        (2, ["parallel.pipeline=2", "parallel.zero_stage=3"], "parallel.zero_stage = 3 does not work with parallel.pipeline = 2"),
        (2, ["parallel.pipeline=2", "parallel.zero_stage=0"], "Set parallel.zero_stage=1"),
        (1, ["parallel.zero_stage=0", "train.precision=bf16"], "parallel.zero_stage = 0 does not work with train.precision = bf16"),
        (1, ["train.micro_batch_size=5"], "train.global_batch_size = 16 is not a multiple of"),
        (
            6,
            ["parallel.tensor=2", "train.micro_batch_size=2"],
            "data-parallel size = 2 x 3 = 6 (data-parallel size = 6 processes / (tensor 2 x pipeline 1)). Choose 12 or 18.",
        ),
        (32, [], "32 x 1"),
        (4, ["parallel.tensor=4", "parallel.sequence=true", "train.sequence_length=30"], "does not divide train.sequence_length = 30"),
    ],
)
def test_impossible_layouts_are_refused(write, world_size: int, overrides: list[str], expected: str) -> None:
    message = refusal(resolve, write(BASE, *overrides), world_size)
    assert expected in message or (expected == "32 x 1" and "Choose 32." in message)


def test_sequence_parallelism_without_tensor_parallelism_is_harmless(write) -> None:
    assert resolve(write(BASE, "parallel.sequence=true"), 1).topology.tensor == 1


# DeepSpeed -------------------------------------------------------------------------------------------------------------------------------


def completed(config: Config, world_size: int = 1) -> dict[str, Any]:
    return resolve(config, world_size).deepspeed


def test_deepspeed_is_completed(write) -> None:
    result = completed(write(BASE, "train.micro_batch_size=2", "optimizer.grad_clip=0.5"), 2)
    assert (result["train_batch_size"], result["train_micro_batch_size_per_gpu"], result["gradient_accumulation_steps"]) == (16, 2, 4)
    assert result["gradient_clipping"] == 0.5
    assert result["zero_optimization"]["stage"] == 1
    assert result["zero_allow_untested_optimizer"] is True
    assert result["wall_clock_breakdown"] is False
    assert not {"fp16", "bf16", "pipeline"} & set(result)


def test_precision_blocks(write) -> None:
    assert completed(write(BASE, "train.precision=bf16"))["bf16"] == {"enabled": True}
    fp16 = completed(write(BASE, "train.precision=fp16"))["fp16"]
    assert fp16 == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 32,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    chosen = write(BASE, "train.precision=fp16", deepspeed={"fp16": {"enabled": "auto", "initial_scale_power": 16}})
    assert completed(chosen)["fp16"]["initial_scale_power"] == 16


def test_zero_stage_of_the_json_is_the_runs_unless_the_yaml_says_one(write) -> None:
    json_2 = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    config = write(BASE, deepspeed=json_2)
    assert config.parallel.zero_stage == 2
    assert completed(config)["zero_optimization"]["overlap_comm"] is True
    assert "zero_optimization.stage = 2, but parallel.zero_stage = 1" in refusal(
        completed, write(BASE, "parallel.zero_stage=1", deepspeed=json_2)
    )
    assert write(BASE, deepspeed={}).parallel.zero_stage == 1


def test_bucket_is_no_larger_than_the_model(write) -> None:
    small = write(BASE, "model.num_layers=1", "model.hidden_size=64")
    assert completed(small)["zero_optimization"]["reduce_bucket_size"] == 40000 * 64 + 2 * 1024 * 64 + 12 * 64**2 + 13 * 64 + 2 * 64
    assert completed(write())["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert (
        completed(write(BASE, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}}))["zero_optimization"]["reduce_bucket_size"] == 7
    )


@pytest.mark.parametrize(
    ("overrides", "split"),
    [
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"], False),
        (["parallel.tensor=2", "parallel.pipeline=2"], None),
        (["parallel.tensor=2", "parallel.sequence=true"], None),
        (["parallel.pipeline=4", "parallel.sequence=true"], None),
    ],
)
def test_stages_do_not_split_again_what_sequence_parallelism_has_split(write, overrides: list[str], split: bool | None) -> None:
    result = completed(write(BASE, *overrides), 4)
    assert result.get("pipeline") == (None if split is None else {"pipe_partitioned": split, "grad_partitioned": split})


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        ({"train_batch_size": 32}, "ds.json: train_batch_size = 32, but train.global_batch_size = 16"),
        ({"train_micro_batch_size_per_gpu": 4}, "but train.micro_batch_size = 1"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4, but train.global_batch_size and the layout give 16"),
        ({"gradient_clipping": 0.3}, "gradient_clipping = 0.3, but optimizer.grad_clip = 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true, but train.precision = fp32"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true, but train.precision = fp32"),
        ({"optimizer": {"type": "Adam"}}, "Remove it; use the 'optimizer' section of the YAML file"),
        ({"scheduler": {"type": "WarmupLR"}}, "use the 'schedule' section of the YAML file"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs parallel.zero_stage 3 or more; it is 2",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs parallel.zero_stage 1 or more; it is 0"),
        ({"zero_optimization": True}, "zero_optimization = True, but a block of settings in braces was expected"),
        ([], "an object in braces is expected"),
        ('{"a": 1,\n "b" 2}', "ds.json: line 2: not valid JSON"),
    ],
)
def test_a_json_that_says_otherwise_is_refused(write, deepspeed: Any, expected: str) -> None:
    assert expected in refusal(lambda: resolve(write(BASE, deepspeed=deepspeed), 1))


def test_what_json_and_yaml_both_say_is_accepted(write) -> None:
    result = completed(write(BASE, deepspeed={"train_batch_size": 16, "gradient_clipping": 1, "fp16": {"enabled": False}}))
    assert result["fp16"] == {"enabled": False}


def test_sequence_parallel_pipeline_refuses_a_json_that_splits_again(write) -> None:
    config = write(
        BASE,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
        deepspeed={"pipeline": {"pipe_partitioned": True}},
    )
    assert "pipeline.pipe_partitioned = true, but parallel.sequence = true" in refusal(resolve, config, 4)
