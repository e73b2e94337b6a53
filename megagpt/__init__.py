"""MegaGPT: from raw text to a trained GPT. See README.md for the tour."""

__version__ = "0.1.0"
