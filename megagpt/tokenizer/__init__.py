"""Tokenizers: tiktoken's encodings by name, with their vocabularies found offline, an own trained BPE, and bytes."""

from megagpt.tokenizer.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer, token_byte_lengths

__all__ = ["TOKENIZER_NAMES", "Tokenizer", "load_tokenizer", "token_byte_lengths"]
