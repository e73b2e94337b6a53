"""Text to token ids and back, by tiktoken.

A tokenizer is a tiktoken encoding by name (gpt2, r50k_base, p50k_base, cl100k_base, o200k_base), `bytes` (256 bytes
and the end-of-document token) or the file of an own BPE (megagpt.tokenizer.training). Text is always text: what spells
a special token in it becomes ordinary tokens. Lone surrogates, which UTF-8 cannot hold, become U+FFFD.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer.ranks import BYTE_RANKS, Ranks, read_rank_file, vocabulary_sha256
from megagpt.tokenizer.vocabulary import PUBLISHED_NAMES, published_definition

TOKENIZER_NAMES = (*PUBLISHED_NAMES, "bytes")

END_OF_DOCUMENT = "<|endoftext|>"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's split of text into pieces within which pairs merge, in tiktoken's form; that of `bytes` and of own BPEs."""

MAX_CHUNK_CHARACTERS = 500_000
"""Longest text given to tiktoken at once. Its regex gives up on a million blanks; its memory is 50 bytes a letter of
a word."""

# Where a letter or digit meets a blank, a line end, a CJK comma or stop. No piece of any pattern in use goes over such
# a place, and none looks back: the tokens before and after it are the same whether the text is cut there or not.
_CUT = r"[^\W_](?=[ \n，。])"
_LAST_CUT = re.compile(rf"(?s:.*){_CUT}")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; safe to share between threads and to send to other processes.

    Made by `load_tokenizer`.
    """

    name: str
    """Published name, `bytes`, or the file name of an own BPE."""
    encoding: tiktoken.Encoding
    """tiktoken's encoding, special tokens included."""
    vocab_sha256: str
    """sha256 of the vocabulary as a rank file: of an own BPE, that of its file as train_tokenizer writes it."""
    path: Path | None = None
    """The file of an own BPE."""

    @property
    def vocab_size(self) -> int:
        """Number of ids a model needs: the largest id, special tokens included, plus one."""
        return self.encoding.n_vocab

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token, which no text encodes to."""
        return self.encoding.eot_token

    @property
    def ranks(self) -> Ranks:
        """The vocabulary without special tokens, {token bytes: id}."""
        return {token: self.encoding.encode_single_token(token) for token in self.encoding.token_byte_values()}

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """The token ids of `text` as a read-only array, without a Python object a token.

        Equal to tiktoken's own encoding, except for text without a place to cut in MAX_CHUNK_CHARACTERS (a million
        blanks, half a million letters without a space): that is cut off at this length.
        """
        try:
            return self._encode_chunks(text)
        except UnicodeEncodeError:
            return self._encode_chunks(without_surrogates(text))

    def decode(self, ids: "Sequence[int] | npt.NDArray[Any]") -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id is not of this vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: "Sequence[int] | npt.NDArray[Any]") -> bytes:
        """The bytes of `ids`, whole characters or not.

        Raises:
            UserError: an id is not of this vocabulary.
        """
        try:
            return self.encoding.decode_bytes(np.asarray(ids).tolist())
        except (KeyError, OverflowError) as error:
            raise UserError(
                f"tokenizer {self.name} ({self.vocab_size} ids) cannot decode: {error.args[0]}; "
                "was the text encoded with another tokenizer?"
            ) from error

    def _encode_chunks(self, text: str) -> npt.NDArray[np.uint32]:
        parts = [self.encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in chunks(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of UTF-8 that each token id stands for: (vocab_size); 0 for special tokens and ids without a token."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for token, rank in tokenizer.ranks.items():
        lengths[rank] = len(token)
    return lengths


def load_tokenizer(name_or_path: str | Path, vocab_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer of this name, or of this file.

    Args:
        name_or_path: one of TOKENIZER_NAMES, or the rank file of an own BPE, whose end-of-document token comes last.
        vocab_dir: where to look first for the vocabulary files of a published name.

    Raises:
        UsageError: there is neither such a name nor such a file, or no folder vocab_dir.
        UserError: the vocabulary cannot be found or is damaged.
    """
    name = str(name_or_path)
    if name in PUBLISHED_NAMES:
        return _from_definition(published_definition(name, vocab_dir))
    if name == "bytes":
        return _from_definition(_own_definition(name, BYTE_RANKS))
    path = Path(name)
    if not path.is_file():
        raise UsageError(_unknown(name, path))
    if path.stem in PUBLISHED_NAMES:
        raise UsageError(
            f"{path}: own BPEs only; for tiktoken's {path.stem} give the name {path.stem} and the vocabulary folder "
            f"{path.parent}"
        )
    return _from_definition(_own_definition(path.name, read_rank_file(path)), path)


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _from_definition(definition: dict[str, Any], path: Path | None = None) -> Tokenizer:
    sha256 = vocabulary_sha256(definition["mergeable_ranks"])
    return Tokenizer(definition["name"], tiktoken.Encoding(**definition), sha256, path)


def _own_definition(name: str, ranks: Ranks) -> dict[str, Any]:
    special_tokens = {END_OF_DOCUMENT: len(ranks)}
    return {"name": name, "pat_str": GPT2_PATTERN, "mergeable_ranks": ranks, "special_tokens": special_tokens}


def _unknown(name: str, path: Path) -> str:
    if name and path.is_dir():
        return f"{name}: a folder; give the tokenizer's file in it"
    nearest = difflib.get_close_matches(name, TOKENIZER_NAMES, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"unknown tokenizer {name!r}{hint}: neither a name ({', '.join(TOKENIZER_NAMES)}) nor a file"


def chunks(text: str) -> Iterator[str]:
    """Cut `text` into chunks of at most MAX_CHUNK_CHARACTERS, where it changes no token if there is such a place."""
    start = 0
    while len(text) - start > MAX_CHUNK_CHARACTERS:
        end = start + MAX_CHUNK_CHARACTERS
        cut = _LAST_CUT.match(text, start, end)
        end = cut.end() if cut else end
        yield text[start:end]
        start = end
    yield text[start:]
