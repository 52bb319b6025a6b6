"""The run's configuration, and what follows from it by arithmetic: sizes, pipeline stages, layout. Nothing here imports torch."""

from pangu.config.load import load_config, parse_config
from pangu.config.schema import Config, Count, ModelConfig, OptimizerConfig, Section

__all__ = ["Config", "Count", "ModelConfig", "OptimizerConfig", "Section", "load_config", "parse_config"]
