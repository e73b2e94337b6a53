"""Training of an own byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with the tokenizers library.

The result is a vocabulary as ranks, for tiktoken, which encodes several times faster. Both split text by GPT-2's
pattern, and merge alike: a token trained here arises from one pair only, so that "merge the pair of lowest rank"
(tiktoken) and "apply the merges in the order they were learned" (tokenizers) are the same rule.
"""

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer.ranks import BYTE_RANKS, Ranks, token_bytes
from megagpt.tokenizer.tokenizer import without_surrogates

MIN_VOCAB_SIZE = len(BYTE_RANKS) + 1

_LONGEST_STRETCH = 256
"""Characters without a blank (or all blank) after which text is cut: the trainer's time grows with the square of it."""

_STRETCH = re.compile(rf"\S{{{_LONGEST_STRETCH}}}|\s{{{_LONGEST_STRETCH}}}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Ranks:
    """Train a byte-level BPE; the same texts in the same order give the same vocabulary.

    Args:
        texts: the documents to count pairs in; read once, never held together in memory.
        vocab_size: entries, the 256 bytes and the end-of-document token included.

    Returns:
        vocab_size - 1 ranks, bytes first; write them with `megagpt.tokenizer.ranks.write_rank_file`.

    Raises:
        UsageError: vocab_size has no room for the bytes and the end-of-document token.
        UserError: the texts have too few different pairs for so many entries.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"vocabulary size {vocab_size}: needs {MIN_VOCAB_SIZE} or more, for 256 bytes and the end-of-document token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sequences(texts), trainer)
    ranks = {token_bytes(token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise UserError(
            f"the text yields a vocabulary of {len(ranks) + 1} entries only; give more text, or ask for no more entries"
        )
    return ranks


def _sequences(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut within stretches that are no words."""
    for text in texts:
        text = without_surrogates(text)
        start = 0
        for stretch in _STRETCH.finditer(text):
            yield text[start : stretch.end()]
            start = stretch.end()
        yield text[start:]
