"""Sampling from a trained model: loading, KV cache, choice of tokens, streaming."""

from megagpt.inference.generate import generate, generate_text
from megagpt.inference.loading import LoadedModel, load_model
from megagpt.inference.sampling import Sampling

__all__ = ["LoadedModel", "Sampling", "generate", "generate_text", "load_model"]
