"""Many documents to token ids, by gigatoken where it is proven to give tiktoken's ids, else by tiktoken.

gigatoken remembers the tokens of every word that it has seen: ten times tiktoken's speed and more on ordinary text. It
is used if it is installed, holds exactly this vocabulary, and encodes every character in use and thousands of texts as
tiktoken does. Documents with the text of a special token are left to tiktoken, and so are those with characters that
Python's own Unicode tables do not know: gigatoken's tables are newer than tiktoken's (17 and 16 today), so that they
disagree on what is a letter among the newest characters only.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import random
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megagpt.errors import UserError
from megagpt.tokenizer.ranks import format_rank_file
from megagpt.tokenizer.tokenizer import Tokenizer, chunks

Backend = Literal["auto", "tiktoken", "gigatoken"]

TRIAL_CHARACTERS = 1 << 24
"""Text that `auto` gives to tiktoken first, in about a second: a small corpus is done before the proof would be."""
MEMORY_CHARACTERS = 1 << 25
"""Text after which gigatoken starts anew, in 0.05 s, as its memory grows with every new word: to 400 MB if all are."""
RANDOM_TEXTS = 3000
"""Texts of the proof, besides all characters."""

PROOF_SHARES = 4
"""Parts of the proof, so that the workers of a run can share it."""

_SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
"""gigatoken's names of the patterns by which text is split into words; that of own BPEs is GPT-2's."""
_PLANES = (range(0x40000), range(0xE0000, 0xF0000))
"""Code points, but for the planes that are empty and the private ones."""
_CHARACTERS_AT_ONCE = 256


class DocumentEncoder:
    """Encodes one document after another, in one thread: what `Tokenizer.encode_to_numpy` gives, whatever the backend.

    `auto` uses gigatoken if it is usable, once TRIAL_CHARACTERS have been encoded. `proven`: gigatoken is used without
    another proof, as all shares of `prove` succeeded. Not to be shared between threads.

    Raises:
        UserError: gigatoken was asked for and cannot be used; says why.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend = "auto", proven: bool = False) -> None:
        self._tokenizer = tokenizer
        self._trial_left = TRIAL_CHARACTERS if backend == "auto" else None
        self._fast: _Gigatoken | None = None
        if backend == "gigatoken":
            try:
                self._fast = _Gigatoken(tokenizer) if proven else _proven(tokenizer)
            except _UnusableError as error:
                raise UserError(
                    f"tokenizer backend gigatoken cannot be used with tokenizer {tokenizer.name}: {error}; "
                    "choose auto or tiktoken"
                ) from error

    @property
    def backend(self) -> str:
        """Who encodes an ordinary document now: tiktoken or gigatoken."""
        return "gigatoken" if self._fast else "tiktoken"

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The token ids of `text`."""
        if self._fast is not None and self._fast.can_encode(text):
            return self._fast.encode(text)
        if self._trial_left is not None:
            self._trial_left -= len(text)
            if self._trial_left < 0:
                self._trial_left = None
                with contextlib.suppress(_UnusableError):  # tiktoken does as well
                    self._fast = _proven(self._tokenizer)
        return self._tokenizer.encode_to_numpy(text)

    def encode_documents(
        self, texts: Iterable[str], dtype: npt.DTypeLike
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of all `texts`, each followed by the end-of-document token: (tokens), in an integer type that holds
        every id; and the number of ids of each text, that token included: (texts)."""
        end = np.array([self._tokenizer.eod_id], np.uint32)
        parts = [ids for text in texts for ids in (self.encode(text), end)]
        lengths = np.fromiter((ids.size + 1 for ids in parts[::2]), np.int64, len(parts) // 2)
        if not parts:
            return np.empty(0, dtype), lengths
        return np.concatenate(parts, dtype=dtype, casting="unsafe"), lengths


class _UnusableError(Exception):
    """Says why gigatoken cannot be used."""


class _Gigatoken:
    """gigatoken with the vocabulary of `tokenizer`. _UnusableError: it is not installed or cannot load it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError as error:
            raise _UnusableError(f"{error}; install it with pip install 'megagpt[fast]'") from error
        self._class = BPETokenizer
        self._scheme = _SCHEMES.get(tokenizer.name, "gpt2")
        self._rank_file = format_rank_file(tokenizer.ranks)
        self._special_tokens = tuple(tokenizer.encoding.special_tokens_set)
        self._unknown = np.ones(0x110000, bool)
        self._unknown[known_characters()] = False
        self._start()
        if self._bpe.vocab != {rank: token for token, rank in tokenizer.ranks.items()}:
            raise _UnusableError("it does not hold the same vocabulary")

    def can_encode(self, text: str) -> bool:
        """Whether the proof covers `text`."""
        if any(token in text for token in self._special_tokens):
            return False
        if text.isascii():
            return True
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return not self._unknown.take(characters).any()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The token ids of `text`."""
        self._memory_left -= len(text)
        if self._memory_left < 0:
            self._start()
        parts = [self._bpe.encode(chunk) for chunk in chunks(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _start(self) -> None:
        """Load the vocabulary, which gigatoken reads from files only; without special tokens it knows none."""
        try:
            with tempfile.TemporaryDirectory(prefix="megagpt_") as folder:
                path = Path(folder) / "ranks.tiktoken"
                path.write_bytes(self._rank_file)
                self._bpe = self._class.from_tiktoken(path, self._scheme, {})
        except (ValueError, RuntimeError, OSError) as error:
            raise _UnusableError(f"it cannot load the vocabulary ({str(error).splitlines()[0]})") from error
        self._memory_left = MEMORY_CHARACTERS


def _proven(tokenizer: Tokenizer) -> _Gigatoken:
    """gigatoken, after the proof, which takes about a second. _UnusableError: it fails."""
    fast = _Gigatoken(tokenizer)
    for share in range(PROOF_SHARES):
        _prove(tokenizer, fast, share)
    fast._start()  # without the memory of the proof
    return fast


def installed_version() -> str | None:
    """gigatoken's version; None: it is not installed."""
    try:
        return importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        return None


def prove(tokenizer: Tokenizer, share: int) -> bool:
    """Whether one of PROOF_SHARES shares of the proof succeeds, each of which takes an equal time."""
    try:
        _prove(tokenizer, _Gigatoken(tokenizer), share)
    except _UnusableError:
        return False
    return True


def _prove(tokenizer: Tokenizer, fast: _Gigatoken, share: int) -> None:
    for text in _proof_share(share):
        if fast.can_encode(text) and not np.array_equal(fast.encode(text), tokenizer.encode_to_numpy(text)):
            version = importlib.metadata.version("gigatoken")
            raise _UnusableError(f"version {version} encodes text in another way than tiktoken, such as {text[:40]!r}")


@functools.cache
def known_characters() -> npt.NDArray[np.int64]:
    """The code points of which Python's Unicode tables know the class, but those of the last two, private planes."""
    category = unicodedata.category
    points = (point for plane in _PLANES for point in plane if category(chr(point)) not in ("Cn", "Cs"))
    return np.fromiter(points, np.int64)


def proof_texts() -> Iterator[str]:
    """Every known character where its class shows (after and before letters, digits, marks, blanks, in contractions),
    and random texts; always the same."""
    return itertools.chain.from_iterable(map(_proof_share, range(PROOF_SHARES)))


def _proof_share(share: int) -> Iterator[str]:
    characters = [chr(point) for point in known_characters().tolist()]
    step = _CHARACTERS_AT_ONCE
    for start in range(share * step, len(characters), PROOF_SHARES * step):
        yield "".join(f" x{c}'s 12{c}34  {c}{c}Ab!{c}\n" for c in characters[start : start + step])
    rng = random.Random(share)
    for _ in range(share, RANDOM_TEXTS, PROOF_SHARES):
        pool = rng.choice((_PIECES, _PIECES, characters, [*rng.choices(_PIECES, k=3), *rng.choices(characters, k=2)]))
        yield "".join(rng.choices(pool, k=rng.randrange(40)))


_BLANKS = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\v", "\f", "\x85", "\xa0", "\u2009", "\u3000")
_PIECES = (
    *_BLANKS,
    *("'s", "'S", "'ll", "'LL", "'ve", "'re", "'d", "'D", "'t", "'m", "'", "''", "’s", "don't", "I'm", "'tis", "ſ"),
    *("0", "7", "42", "123", "1234", "3.14159", "1,000,000", "2024-11-20", "٣٤", "½", "²", "Ⅷ", "1" * 40),
    *(".", "...", "!?", "--", "//", "/*", "*/", "==", "!=", "->", "();", "{}", '"', "`", "#", "$", "_", "__init__"),
    *("the", " the", "The", "THE", " of", " language", " tokenization", "camelCase", "HTTPServer", "snake_case", "éA"),
    *(" internationalization", "a" * 300, " " * 90, "=" * 130, "ab" * 260, "\n" * 50, "https://example.org/?a=b&c"),
    *(" Straße", " œuvre", " façade", " Ελλάδα", " Москва", " été", " e\u0301te\u0301", " Việt Nam", " İstanbul"),
    *("你好，世界。", "日本語のテキスト", "한국어 문장", " हिन्दी में", " ภาษาไทย", " العربية", " עברית"),
    *("👍", "👩\u200d👩\u200d👧", "🏴\U000e0067\U000e0062\U000e007f", "🇩🇪", "☃\ufe0f", "𝒳", "𐍈"),
    *("\u200d", "\u0301", "\ufe0f", "\u200b", "\ufeff", "\0", "\x1f", "\x7f", "\xad", "\ufffd"),
    *("def f(x):\n    return x\n", "<div class='a'>", "for (int i = 0; i < n; i++)", "SELECT * FROM t", "<|", "|>"),
)
"""Pieces of the random texts, by kind: blanks, contractions, numbers, marks, words, long runs, scripts, emoji, code."""
