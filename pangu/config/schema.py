"""The run's configuration: one class per section, a field per key, checked when it is made.

Paths are relative to the current directory, except `deepspeed`, which is relative to the folder of the YAML file that names it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron_ext.topology import Order
from pangu.config.activations import ActivationName
from pangu.config.presets import MODEL_PRESETS, Preset

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
DerivedCount = Annotated[int, Field(ge=0, strict=True), BeforeValidator(lambda value: 0 if value is None else value)]
"""A count that other keys give where it is null (held as 0 until then)."""


class Section(BaseModel):
    """What every section shares: unknown keys are refused, and values never change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """What the network is. `preset` gives every size; any key written beside it wins over the preset."""

    preset: Preset | None = None
    """A published size: 350M, 2.6B, 13B or 200B."""
    num_layers: Count
    """Transformer layers, the query layer included, as the paper counts."""
    hidden_size: Count
    """Width of the residual stream."""
    num_heads: Count
    """Attention heads; must divide `hidden_size`, and be divided by `parallel.tensor`."""
    vocab_size: Count = 40000
    """Number of token ids of the tokenizer. Padding for tensor parallelism is added where it is needed, and is not counted here."""
    max_positions: Count = 1024
    """Rows of the position and query embeddings: the longest sequence the model can see."""
    ffn_hidden_size: DerivedCount = 0
    """Width inside the MLP; null = 4 x hidden_size."""
    gelu: ActivationName = "tanh"
    """`tanh` trained the released weights; other ports run `erf` or `sigmoid` (x·sigmoid(1.702x)). Change it only to match a checkpoint."""
    final_norm: Literal["before_query", "after_query"] = "before_query"
    """Where the final LayerNorm sits: before the query layer in the released 2.6B and 13B, after it in the 200B code."""
    hidden_dropout: Fraction = 0.1
    """Dropout of the embedding sum and of both sublayer outputs."""
    attention_dropout: Fraction = 0.1
    """Dropout of the attention weights."""
    attention: Literal["eager", "sdpa", "npu_fusion"] = "sdpa"
    """`eager` is the reference; `sdpa` is torch's fused attention; `npu_fusion` is Ascend's."""
    separator_id: CountOrZero = 9
    """Token that ends a document (`<eot>`)."""
    pad_id: CountOrZero = 6
    """Token that fills a sample; its positions carry no loss."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**MODEL_PRESETS[preset], **values} if isinstance(preset, str) and preset in MODEL_PRESETS else values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_size = {self.hidden_size}. "
                "Every head has hidden_size / num_heads features: change one of the two."
            )
        for key in ("separator_id", "pad_id"):
            if getattr(self, key) >= self.vocab_size:
                raise ValueError(f"model.{key} = {getattr(self, key)} is not below model.vocab_size = {self.vocab_size}.")
        _set(self, "ffn_hidden_size", self.ffn_hidden_size or 4 * self.hidden_size)
        return self

    def identity(self) -> dict[str, int | str]:
        """The keys, with their values, that decide what weights fit and what logits they give: two configurations that agree in all of
        them are the same model. Dropout, the attention implementation and the ids of special tokens are not among them.
        """
        keys = ("num_layers", "hidden_size", "num_heads", "vocab_size", "max_positions", "ffn_hidden_size", "gelu", "final_norm")
        return {key: getattr(self, key) for key in keys}


class ParallelConfig(Section):
    """How the model is laid over the devices. The data-parallel size is what remains: world size / (tensor x pipeline)."""

    tensor: Count = 1
    """Ranks that share each layer's matrices. Keep it inside one server."""
    pipeline: Count = 1
    """Stages the layers are cut into. More than one needs `zero_stage` 1."""
    stage_layers: list[Count] | None = None
    """Transformer layers of each pipeline stage, the query layer included; null = balanced by parameters. The first stage holds the
    embeddings besides, the last the logits."""
    order: Order = "tp-dp-pp"
    """Which ranks are neighbours. Tensor-parallel ones always; next in `tp-dp-pp` data-parallel ones, in `tp-pp-dp` the stages of a
    pipeline, as in the paper."""
    sequence: bool = False
    """Sequence parallelism: split what tensor parallelism leaves whole along the sequence. Less memory, the same traffic."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards the optimizer states over the data-parallel ranks, 2 gradients too, 3 weights too. Left out, a DeepSpeed
    JSON that names a stage decides."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Rematerialization: `selective` computes attention again in the backward pass, `full` whole layers (a third more computation)."""


class TrainConfig(Section):
    """How long and on how much."""

    micro_batch_size: Count = 1
    """Samples a rank computes at once."""
    global_batch_size: Count
    """Samples an optimizer step sees: micro_batch_size x accumulation x data-parallel size."""
    steps: Count
    """Optimizer steps of the whole run, resumed parts included."""
    seed: CountOrZero = 1234
    """Seed of the initial weights, the order of the samples and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`fp32` runs everywhere; `bf16` on recent devices; `fp16`, with a dynamic loss scale, is how the original was trained."""
    sequence_length: DerivedCount = 0
    """Tokens a sample; null = model.max_positions."""
    compile: bool = False
    """Compile each layer with torch.compile: a minute at the start, and fewer and larger kernels. It gains nothing on the CPU."""
    eval_every: CountOrZero = 0
    """Steps between evaluations on the validation part; 0 = never."""
    eval_batches: Count = 10
    """Global batches an evaluation reads."""
    on_bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """After a step whose loss or gradient is not finite, or that is a spike; its update is dropped in any case. `skip`: go on with the next
    batch, ten in a row end the run; `rollback`: return to the newest checkpoint and go on with later data; `stop`: end the run."""
    spike_factor: Annotated[float, Field(ge=0.0)] = 0.0
    """A loss above this multiple of the median of the last 100 is a spike; 0 = off."""
    profile: str | None = None
    """START:STOP, such as 10:13: every rank records the steps START to STOP - 1 with torch's profiler and writes them to run.dir/profile.
    null = off."""

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names, counted from 1 as in metrics.jsonl."""
        start, _, stop = (self.profile or "0:0").partition(":")
        return range(int(start), int(stop))

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.profile is not None:
            if not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", self.profile) or not self.profiled_steps or not self.profiled_steps.start:
                raise ValueError(
                    f"train.profile = {self.profile}: START:STOP is expected, from step 1 on and START below STOP, such as 10:13, which "
                    "records the steps 10, 11 and 12."
                )
            if self.profiled_steps.start > self.steps:
                raise ValueError(f"train.profile = {self.profile} begins after the last step, train.steps = {self.steps}. Lower its START.")
        if 0.0 < self.spike_factor <= 1.0:
            raise ValueError(f"train.spike_factor = {self.spike_factor} calls half of all steps spikes. Set it above 1, or 0 = off.")
        return self


class OptimizerConfig(Section):
    """The optimizer; defaults are the paper's for 2.6B (Table 5)."""

    name: Literal["pangu_adam", "adamw"] = "pangu_adam"
    """`pangu_adam`: the original, with decoupled weight decay and no bias correction; `adamw`: torch's."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Highest learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay of every parameter but biases and LayerNorm."""
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global norm of the gradient; 0 = off."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.name == "pangu_adam" and max(self.betas) > 0.9999:
            raise ValueError(
                f"optimizer.betas = {list(self.betas)}: pangu_adam has no bias correction and takes at most 0.9999. "
                "Lower them, or set optimizer.name=adamw."
            )
        return self


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then cosine decay to `min_lr`."""

    name: Literal["original", "cosine"] = "original"
    """`original` counts the cosine from step 0, as the released code does; `cosine` from the end of the warm-up."""
    warmup_steps: CountOrZero = 2000
    """Steps from 0 to `optimizer.lr`."""
    decay_steps: DerivedCount = 0
    """Step at which `min_lr` is reached; null = train.steps."""
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    """Learning rate after the decay."""


class DataConfig(Section):
    """What is read. Each data set is PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them."""

    train: Annotated[list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    """Prefixes of the data sets; one may be given without a list."""
    weights: list[Annotated[float, Field(gt=0.0)]] | None = None
    """Sampling weight of each data set; null = in proportion to their sizes."""
    eod_reset: bool = True
    """Documents that share a sample do not see each other, and positions restart at each."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that made the data; kept with the weights so that they can generate."""
    validation_fraction: Fraction = 0.0
    """Part of the documents held back for `train.eval_every`."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"data.weights has {len(self.weights)} values for {len(self.train)} data sets in data.train. Give one each.")
        return self


class CheckpointConfig(Section):
    """What is saved and what a run starts from."""

    dir: Path | None = None
    """Where checkpoints go; null = run.dir/checkpoints. Read it as `Config.checkpoint_dir`."""
    save_every: CountOrZero = 0
    """Steps between checkpoints; 0 = only at the end."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on. Host memory must hold each rank's weights and optimizer once more."""
    resume: str = "auto"
    """`auto`: from the newest checkpoint if there is one; `never`; or the path of a checkpoint."""
    init_from: Path | None = None
    """Weights a new run starts from, in any format that tools/convert_checkpoint.py reads; null = fresh weights."""


class RunConfig(Section):
    """Where the run writes."""

    dir: Path
    """The run directory: resolved configuration, metrics, checkpoints."""
    log_every: Count = 1
    """Steps between lines on the screen; metrics.jsonl gets every step."""
    tensorboard: bool = True
    """Write TensorBoard events where tensorboard is installed."""
    hang_timeout: Annotated[float, Field(ge=0.0)] = 600.0
    """Seconds that a step, a checkpoint or the start of all ranks may take; then the run ends and says which rank is late. 0 = no limit."""
    consistency_every: CountOrZero = 100
    """Steps between checks that what several ranks hold alike is equal; also at the start, before each checkpoint and after a bad step.
    Ranks that hold the others up are looked for at the same steps. 0 = never."""


class Config(Section):
    """Everything a run needs."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig
    deepspeed: Path | None = None
    """A DeepSpeed JSON, for what this file has no key for. Batch sizes, clipping and precision are filled in from here."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        # In copies: a default section is one object that every Config shares.
        sequence_length = self.train.sequence_length or self.model.max_positions
        _set(self, "train", self.train.model_copy(update={"sequence_length": sequence_length}))
        _set(self, "schedule", self.schedule.model_copy(update={"decay_steps": self.schedule.decay_steps or self.train.steps}))
        if self.train.sequence_length > self.model.max_positions:
            raise ValueError(
                f"train.sequence_length = {self.train.sequence_length} is more than model.max_positions = {self.model.max_positions}: "
                "later positions have no embedding. Lower the first or raise the second."
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr = {self.schedule.min_lr} is above optimizer.lr = {self.optimizer.lr}. Lower the first.")
        if self.train.on_bad_step == "rollback" and not self.checkpoint.save_every:
            raise ValueError(
                "train.on_bad_step = rollback but checkpoint.save_every = 0: there is no checkpoint to return to before the end. "
                "Set checkpoint.save_every."
            )
        if self.train.eval_every and not self.data.validation_fraction:
            raise ValueError(
                f"train.eval_every = {self.train.eval_every} but data.validation_fraction = 0 holds no document back. "
                "Set data.validation_fraction=0.01, or train.eval_every=0."
            )
        return self

    @property
    def checkpoint_dir(self) -> Path:
        """`checkpoint.dir`, or run.dir/checkpoints where that is null."""
        return self.checkpoint.dir or self.run.dir / "checkpoints"

    def to_yaml(self) -> str:
        """The resolved configuration, presets and defaults written out; `load_config` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set(section: Section, key: str, value: object) -> None:
    """Give a derived key its value while the section is being made; afterwards it is frozen."""
    object.__setattr__(section, key, value)
