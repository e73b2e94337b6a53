"""Typed, validated configuration: the schema, and its way from and to YAML files."""

from megagpt.config.batch import check_batch
from megagpt.config.loading import load_config, save_config
from megagpt.config.precision import check_precision
from megagpt.config.schema import ModelConfig, RunConfig

__all__ = ["ModelConfig", "RunConfig", "check_batch", "check_precision", "load_config", "save_config"]
