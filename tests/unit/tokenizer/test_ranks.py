"""The rank file: tiktoken's own loader reads what is written, and what is no such file is refused by line."""

import base64
import hashlib
from pathlib import Path

import pytest
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.ranks import BYTE_RANKS, format_rank_file, read_rank_file, token_bytes, vocabulary_sha256
from megagpt.tokenizer.ranks import write_rank_file as write

RANKS = BYTE_RANKS | {b"th": 256, b"the": 257, b"\n ": 258}


def test_the_layout_is_base64_a_space_and_the_id() -> None:
    assert format_rank_file({b"the": 1, b"\x00": 0}) == b"AA== 0\ndGhl 1\n"


@given(st.sets(st.binary(min_size=2, max_size=9), max_size=20))
def test_tiktokens_loader_reads_what_is_written(tokens: set[bytes]) -> None:
    ranks = BYTE_RANKS | {token: 256 + i for i, token in enumerate(sorted(tokens))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiktoken.load, "read_file_cached", lambda path, sha256: format_rank_file(ranks))
        assert tiktoken.load.load_tiktoken_bpe("file") == ranks


def test_a_file_read_back_is_the_same(tmp_path: Path) -> None:
    write(RANKS, tmp_path / "new" / "folder" / "own.tiktoken")
    assert read_rank_file(tmp_path / "new" / "folder" / "own.tiktoken") == RANKS
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["own.tiktoken"]


def test_an_own_vocabulary_has_its_end_of_document_last_and_the_sha256_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    write(RANKS, path)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.path) == ("own.tiktoken", path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (260, 259)
    assert tokenizer.encode("the\n  x") == [257, 258, 32, 120]
    assert tokenizer.vocab_sha256 == vocabulary_sha256(RANKS) == hashlib.sha256(path.read_bytes()).hexdigest()


def broken(line: int, content: bytes) -> bytes:
    """The file of RANKS with line `line`, from 1, replaced by `content`."""
    lines = format_rank_file(RANKS).splitlines(keepends=True)
    return b"".join([*lines[: line - 1], content, *lines[line:]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "line 1: not a line of a tiktoken rank file"),
        (b"\xff\xfe\x00", "line 1: not a line"),
        (broken(7, b"Bg==\n"), "line 7: not a line"),
        (broken(7, b"B*== 6\n"), "line 7: not a line"),
        (broken(7, b"Bg== six\n"), "line 7: not a line"),
        (broken(7, b""), "line 7: id 7 where 6 must follow; the file is damaged"),
        (broken(258, b"dGg= 257\n"), "line 258: the token b'th' stands there twice"),
        (format_rank_file(RANKS)[:790], "156 of the 256 single bytes have no token; the file is cut off"),
        (b"", "256 of the 256 single bytes have no token"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_gpt2s_printable_characters_stand_for_each_byte_once() -> None:
    characters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(0x100, 0x144)]
    characters += [chr(code) for code in range(161, 256) if code != 173]
    assert sorted(token_bytes("".join(characters))) == list(range(256))
    assert token_bytes("Ġhé") == b" h\xe9"
    assert base64.b64encode(token_bytes("Ċ")) == b"Cg=="
