"""Typed, validated configuration: the schema, and its way from and to YAML files."""

from megagpt.config.batch import BatchSizes, check_batch, check_batches
from megagpt.config.loading import load_config, save_config
from megagpt.config.precision import check_precision
from megagpt.config.schema import ModelConfig, RunConfig

__all__ = [
    "BatchSizes",
    "ModelConfig",
    "RunConfig",
    "check_batch",
    "check_batches",
    "check_precision",
    "load_config",
    "save_config",
]
