"""Reads and writes weights in every format: one stream of tensors, with a reader and a writer for each format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.topology import Topology
    from pangu.conversion.weights import Overrides
    from pangu.model.model import PanguModel


def load_weights(path: Path | str, model: PanguModel, topology: Topology, overrides: Overrides | None = None) -> None:
    """Load weights of any format into a model, or into this rank's tensor-parallel slice of one. Each rank reads only its slice.

    Args:
        path: file or directory.
        model: built for this rank; its parameters are overwritten and keep their dtype.
        topology: the grid of all running processes; for one process, `Topology(tensor=1, pipeline=1, data=1)`.
        overrides: facts about the model that the weights do not contain.

    Raises:
        InputError: if the weights are damaged, incomplete, or those of another model.
    """
    import torch

    from megatron_ext.collectives import world_rank
    from megatron_ext.sharding import canonical_parameters
    from pangu.conversion.formats import open_weights

    weights = open_weights(path, overrides)
    weights.refuse_other(model.config, str(path))
    place = topology.coordinates(world_rank())
    with torch.no_grad():
        for spec, parameter in canonical_parameters(model):
            weights.fill(parameter, spec, place.tensor, topology.tensor)
