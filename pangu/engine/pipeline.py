"""The same model as DeepSpeed pipeline stages.

Each layer passes (x, position ids) to the next. Nothing else is needed: the position ids say where documents begin, so no attention mask
ever crosses a stage boundary. The word embedding is the one tied module: first and last stage each hold it.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_ext.context import ParallelContext
from megatron_ext.layers import LayerNorm, VocabParallelEmbedding
from megatron_ext.topology import Topology
from pangu.config import ModelConfig
from pangu.config.stages import stage_bounds
from pangu.model.block import Block, RunOptions
from pangu.model.embedding import PositionEmbedding, WordEmbedding
from pangu.model.model import language_model_loss
from pangu.model.query_layer import QueryLayer

if TYPE_CHECKING:
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology

Activations = tuple[Tensor, Tensor]
"""What one layer passes to the next: x_BSH on the residual stream, and position_ids_BS, int64, for the whole sequence."""


class PipeWordEmbedding(WordEmbedding):
    """The word embedding as a pipeline layer, and the module that the output layer is tied to.

    The look-up is the module's own `forward`: DeepSpeed saves a tied module only where the layer is the module itself, not a function of
    it, and otherwise a resumed run silently starts from the initial weights.
    """

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        """(tokens, position ids) -> (words, position ids)."""
        return super().forward(inputs[0]), inputs[1]


def _output(words: VocabParallelEmbedding, inputs: Activations) -> Tensor:
    """The input of the output layer, which is computed with the loss (`pipeline_loss`), so that the logits never exist all at once."""
    return inputs[0]


class PipePositionEmbedding(PositionEmbedding):
    """The position embedding as a pipeline layer."""

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        """(words, position ids) -> (x, position ids)."""
        return super().forward(*inputs), inputs[1]


class PipeBlock(Block):
    """A block as a pipeline layer."""

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        """(x, position ids) -> (x, position ids)."""
        return super().forward(*inputs), inputs[1]


class PipeLayerNorm(LayerNorm):
    """The final layer norm as a pipeline layer."""

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        """(x, position ids) -> (x, position ids)."""
        return super().forward(inputs[0]), inputs[1]


class PipeQueryLayer(QueryLayer):
    """The query layer as a pipeline layer."""

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        """(x, position ids) -> (x, position ids)."""
        return super().forward(*inputs), inputs[1]


def pipeline_layers(config: ModelConfig, context: ParallelContext, options: RunOptions) -> list[LayerSpec]:
    """The model as a list of layer specifications; a stage builds only its own layers."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    blocks = [LayerSpec(PipeBlock, config, context, options, index=i) for i in range(config.num_layers - 1)]
    final_norm = LayerSpec(PipeLayerNorm, config.hidden_size, context, name="transformer.ln_f")
    query_layer = LayerSpec(PipeQueryLayer, config, context, options)
    top = [final_norm, query_layer] if config.final_norm == "before_query" else [query_layer, final_norm]
    return [
        TiedLayerSpec("words", PipeWordEmbedding, config, context),
        LayerSpec(PipePositionEmbedding, config, context),
        *blocks,
        *top,
        TiedLayerSpec("words", PipeWordEmbedding, config, context, forward_fn=_output),
    ]


def pipeline_loss(stage: PipelineModule) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """The loss function of the last stage, with the output layer in it: (x_BSH, (labels, loss mask)) -> scalar."""

    def loss(x_BSH: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        return language_model_loss(stage.tied_modules["words"], x_BSH, *labels)

    return loss


def build_pipeline(
    config: ModelConfig, context: ParallelContext, options: RunOptions, topology: Topology, layers: Sequence[int]
) -> PipelineModule:
    """This rank's stage as a DeepSpeed PipelineModule. torch.distributed must be initialised.

    Args:
        config: the model.
        context: where it runs and how it is split.
        options: what this run decides.
        topology: the grid of all running processes.
        layers: number of transformer layers of each stage (pangu.config.stages).
    """
    from deepspeed.pipe import PipelineModule

    bounds = stage_bounds(config, layers)

    class PanguPipeline(PipelineModule):
        """Cuts the layers at `stage_bounds`; DeepSpeed's own partition methods build every layer, or ignore the logits."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = bounds
            self._set_bounds(bounds[self.stage_id], bounds[self.stage_id + 1])

    with quiet():
        stage = PanguPipeline(
            layers=pipeline_layers(config, context, options),
            topology=_process_topology(topology),
        )
    stage.loss_fn = pipeline_loss(stage)
    return stage


def _process_topology(topology: Topology) -> ProcessTopology:
    """The same grid as a DeepSpeed topology: the slowest-varying axis first."""
    from deepspeed.runtime.pipe.topology import ProcessTopology

    sizes = {"pipe": topology.pipeline, "data": topology.data}
    outer = ["pipe", "data"] if topology.order == "tp-dp-pp" else ["data", "pipe"]
    return ProcessTopology(axes=[*outer, "model"], dims=[*(sizes[axis] for axis in outer), topology.tensor])


@contextlib.contextmanager
def quiet() -> Any:
    """Suppress DeepSpeed's log messages while it builds; errors are still printed.

    Its warnings here are about optimizers it has not tested, which ours are by design.
    """
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))  # nor does every later step need an announcement
