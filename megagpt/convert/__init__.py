"""Trained models from and to the formats of others. `convert` is the whole of it, `open_source` reads any of them."""

from megagpt.convert.conversion import TARGETS, Conversion, Options, convert
from megagpt.convert.source import Source, open_source, tokenizer_of

__all__ = ["TARGETS", "Conversion", "Options", "Source", "convert", "open_source", "tokenizer_of"]
