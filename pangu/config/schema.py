"""The run's configuration: one class per section, one field per key, validated at construction.

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
"""A count that is derived from other keys if it is null; 0 until then."""


class Section(BaseModel):
    """Base class of all sections: unknown keys are refused, and values cannot be changed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network. `preset` sets every size; any key written beside it takes precedence over the preset."""

    preset: Preset | None = None
    """A published size: 350M, 2.6B, 13B or 200B."""
    num_layers: Count
    """Number of Transformer layers, the query layer included, as in the paper."""
    hidden_size: Count
    """Width of the residual stream."""
    num_heads: Count
    """Number of attention heads. It must divide `hidden_size` and be divisible by `parallel.tensor`."""
    vocab_size: Count = 40000
    """Number of token ids of the tokenizer. Padding for tensor parallelism is added where it is needed, and is not counted here."""
    max_positions: Count = 1024
    """Rows of the position and query embeddings: the longest sequence that the model can process."""
    ffn_hidden_size: DerivedCount = 0
    """Width of the MLP's hidden layer; null = 4 x hidden_size."""
    gelu: ActivationName = "tanh"
    """Activation function of the MLP. The released weights were trained with `tanh`; other ports use `erf` or `sigmoid`
    (x·sigmoid(1.702x)). Change it only to match a checkpoint."""
    final_norm: Literal["before_query", "after_query"] = "before_query"
    """Position of the final LayerNorm: before the query layer in the released 2.6B and 13B, after it in the 200B code."""
    hidden_dropout: Fraction = 0.1
    """Dropout probability of the embedding sum and of both sublayer outputs."""
    attention_dropout: Fraction = 0.1
    """Dropout probability of the attention weights."""
    attention: Literal["eager", "sdpa", "npu_fusion"] = "sdpa"
    """Implementation of attention: `eager` is the reference, `sdpa` torch's fused attention, `npu_fusion` Ascend's fused kernel."""
    separator_id: CountOrZero = 9
    """Id of the token that ends a document (`<eot>`)."""
    pad_id: CountOrZero = 6
    """Id of the padding token; positions whose input is padding have no loss."""

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
    """How the model is distributed over the devices. The data-parallel size is what remains: world size / (tensor x pipeline)."""

    tensor: Count = 1
    """Tensor-parallel size: number of ranks that share each layer's matrices. Keep them within one server."""
    pipeline: Count = 1
    """Pipeline-parallel size: number of stages that the layers are cut into. More than one needs `zero_stage` 1."""
    stage_layers: list[Count] | None = None
    """Number of Transformer layers of each pipeline stage, the query layer included; null = balanced by parameters. The first stage also
    holds the embeddings, the last also the logits."""
    order: Order = "tp-dp-pp"
    """Order of the ranks, fastest-varying axis first. Tensor-parallel ranks are always neighbours; next come data-parallel ranks in
    `tp-dp-pp`, and the stages of a pipeline in `tp-pp-dp`, as in the paper."""
    sequence: bool = False
    """Sequence parallelism: activations that tensor parallelism does not split are split along the sequence. Less memory, the same
    traffic."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer states over the data-parallel ranks, 2 also the gradients, 3 also the weights. If the
    key is left out, the stage of the DeepSpeed JSON is used, if it names one."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Rematerialization: `selective` computes attention again in the backward pass, `full` whole layers (a third more computation)."""


class TrainConfig(Section):
    """Length of the run, batch sizes and precision."""

    micro_batch_size: Count = 1
    """Samples that a rank computes at once."""
    global_batch_size: Count
    """Samples per optimizer step: micro_batch_size x gradient accumulation steps x data-parallel size."""
    steps: Count
    """Optimizer steps of the whole run, including those before a resume."""
    seed: CountOrZero = 1234
    """Seed of the initial weights, the order of the samples and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of weights, gradients and activations. `fp32` runs everywhere, `bf16` on recent devices; the original was trained in `fp16`,
    which uses a dynamic loss scale."""
    sequence_length: DerivedCount = 0
    """Tokens per sample; null = model.max_positions."""
    compile: bool = False
    """Compile each layer with torch.compile, which takes a minute at the start and gives fewer and larger kernels. No gain on the CPU."""
    eval_every: CountOrZero = 0
    """Steps between evaluations on the validation set; 0 = never."""
    eval_batches: Count = 10
    """Global batches per evaluation."""
    on_bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """What to do after a step whose loss or gradient is not finite, or whose loss is a spike; its update is dropped in any case. `skip`:
    continue with the next batch, ten in a row end the run; `rollback`: return to the newest checkpoint and continue with later data;
    `stop`: end the run."""
    spike_factor: Annotated[float, Field(ge=0.0)] = 0.0
    """A loss above this multiple of the median of the last 100 steps is a spike; 0 = off."""
    profile: str | None = None
    """Steps to profile, as START:STOP, such as 10:13: every rank records the steps START to STOP - 1 with torch's profiler and writes them
    to run.dir/profile. null = off."""

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
                    f"train.profile = {self.profile}: expected START:STOP with 1 <= START < STOP, such as 10:13, which records the steps "
                    "10, 11 and 12."
                )
            if self.profiled_steps.start > self.steps:
                raise ValueError(f"train.profile = {self.profile} begins after the last step, train.steps = {self.steps}. Lower its START.")
        if 0.0 < self.spike_factor <= 1.0:
            raise ValueError(f"train.spike_factor = {self.spike_factor} would make half of all steps spikes. Set it above 1, or 0 = off.")
        return self


class OptimizerConfig(Section):
    """The optimizer; defaults are the paper's for 2.6B (Table 5)."""

    name: Literal["pangu_adam", "adamw"] = "pangu_adam"
    """Optimizer. `pangu_adam` is the original's Adam with decoupled weight decay and no bias correction; `adamw` is torch's."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Constant added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay of all parameters except biases and LayerNorm."""
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this global norm; 0 = no clipping."""

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
    """Schedule. `original` counts the cosine from step 0, as the released code does; `cosine` from the end of the warm-up."""
    warmup_steps: CountOrZero = 2000
    """Steps of linear warm-up from 0 to `optimizer.lr`."""
    decay_steps: DerivedCount = 0
    """Step at which `min_lr` is reached; null = train.steps."""
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    """Learning rate after the decay."""


class DataConfig(Section):
    """The training data. Each data set is PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them."""

    train: Annotated[list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    """Prefixes of the data sets; a single one may be given without a list."""
    weights: list[Annotated[float, Field(gt=0.0)]] | None = None
    """Sampling weight of each data set; null = in proportion to their sizes."""
    eod_reset: bool = True
    """Whether attention is limited to the document and positions restart at 0 where several documents share a sample."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that made the data; it is saved with the weights so that they can generate text."""
    validation_fraction: Fraction = 0.0
    """Fraction of the documents held out for `train.eval_every`."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights has {len(self.weights)} values for {len(self.train)} data sets in data.train. Give one for each."
            )
        return self


class CheckpointConfig(Section):
    """Saving checkpoints, and starting from them or from weights."""

    dir: Path | None = None
    """Directory of the checkpoints; null = run.dir/checkpoints. In code, read `Config.checkpoint_dir`."""
    save_every: CountOrZero = 0
    """Steps between checkpoints; 0 = only at the end."""
    keep: Count = 2
    """Number of the newest checkpoints that are kept."""
    async_save: bool = False
    """Write checkpoints in the background while training continues. Host memory must hold a second copy of each rank's weights and
    optimizer states."""
    resume: str = "auto"
    """What to resume from. `auto`: the newest checkpoint if there is one; `never`: nothing; or the path of a checkpoint."""
    init_from: Path | None = None
    """Weights that a new run starts from, in any format that tools/convert_checkpoint.py reads; null = random initial weights."""


class RunConfig(Section):
    """Output directory, logging and supervision of the run."""

    dir: Path
    """The run directory: resolved configuration, metrics, checkpoints."""
    log_every: Count = 1
    """Steps between progress lines on the terminal; metrics.jsonl records every step."""
    tensorboard: bool = True
    """Write TensorBoard events if tensorboard is installed."""
    hang_timeout: Annotated[float, Field(ge=0.0)] = 600.0
    """Seconds that a step, a checkpoint or the start of all ranks may take; after that the run ends and reports which rank is late. 0 = no
    limit."""
    consistency_every: CountOrZero = 100
    """Steps between checks that replicas on different ranks are equal; they are also checked at the start, before each checkpoint and after
    a bad step. Slow ranks are looked for at the same steps. 0 = never."""


class Config(Section):
    """The configuration of a run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig
    deepspeed: Path | None = None
    """A DeepSpeed JSON with settings for which this file has no key. Batch sizes, clipping and precision are completed from this file."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        # In copies: a default section is one object that every Config shares.
        sequence_length = self.train.sequence_length or self.model.max_positions
        _set(self, "train", self.train.model_copy(update={"sequence_length": sequence_length}))
        _set(self, "schedule", self.schedule.model_copy(update={"decay_steps": self.schedule.decay_steps or self.train.steps}))
        if self.train.sequence_length > self.model.max_positions:
            raise ValueError(
                f"train.sequence_length = {self.train.sequence_length} is more than model.max_positions = {self.model.max_positions}: "
                "later positions have no embedding. Lower train.sequence_length or raise model.max_positions."
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr = {self.schedule.min_lr} is above optimizer.lr = {self.optimizer.lr}. Lower schedule.min_lr."
            )
        if self.train.on_bad_step == "rollback" and not self.checkpoint.save_every:
            raise ValueError(
                "train.on_bad_step = rollback but checkpoint.save_every = 0: there is no checkpoint to return to before the end. "
                "Set checkpoint.save_every."
            )
        if self.train.eval_every and not self.data.validation_fraction:
            raise ValueError(
                f"train.eval_every = {self.train.eval_every} but data.validation_fraction = 0 holds out no documents. "
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
