"""The vocabulary of a byte-level BPE as ranks, {token bytes: id}: a pair merges first whose union has the lowest rank.

On disk it is tiktoken's rank file, one line a token in the order of ids: base64 of the token's bytes, a space, the id.
The end-of-document token is no part of it: it gets the id after the last one. Also here: the printable characters by
which GPT-2's own files and the tokenizers library write bytes (Radford et al. 2019, encoder.py).
"""

import base64
import hashlib
import os
from pathlib import Path

from megagpt.errors import UserError

Ranks = dict[bytes, int]

BYTE_RANKS: Ranks = {bytes([byte]): byte for byte in range(256)}
"""The vocabulary without any merge: a token is a byte."""


def format_rank_file(ranks: Ranks) -> bytes:
    """The contents of the rank file of `ranks`, byte for byte as tiktoken's publishers write it."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def vocabulary_sha256(ranks: Ranks) -> str:
    """Fingerprint of a vocabulary: the hexadecimal sha256 of its rank file (what `sha256sum FILE` prints)."""
    return hashlib.sha256(format_rank_file(ranks)).hexdigest()


def write_rank_file(ranks: Ranks, path: str | Path) -> None:
    """Write `ranks` to `path`, whole or not at all; its folder is created if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(format_rank_file(ranks))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_rank_file(path: str | Path) -> Ranks:
    """Read a rank file whose ids are 0, 1, 2, ... and which knows every single byte.

    Raises:
        UserError: the file cannot be read, or is not such a file; names the line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    ranks: Ranks = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            encoded, rank = line.split()
            token, given = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:
            raise UserError(
                f"{where}: not a line of a tiktoken rank file (base64 of a token, a space, its id); "
                "give a file made by python -m tools.train_tokenizer"
            ) from error
        if given != number - 1:
            raise UserError(f"{where}: id {given} where {number - 1} must follow; the file is damaged, make it anew")
        if token in ranks:
            raise UserError(f"{where}: the token {token!r} stands there twice; the file is damaged, make it anew")
        ranks[token] = given
    missing = sum(byte not in ranks for byte in BYTE_RANKS)
    if missing:
        raise UserError(
            f"{path}: {missing} of the 256 single bytes have no token; the file is cut off or not byte-level"
        )
    return ranks


def token_bytes(characters: str) -> bytes:
    """The bytes of a token written in GPT-2's printable characters."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in characters)


def token_characters(token: bytes) -> str:
    """The bytes of a token in GPT-2's printable characters."""
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)


def _bytes_by_character() -> dict[str, int]:
    """The character that stands for each byte: the byte's own if printable and no space, else one from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _bytes_by_character()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
