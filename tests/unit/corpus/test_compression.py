"""Compressed files: all of their content comes out, also what precedes damage, and the damage is named."""

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megagpt.corpus.records import BadRecord
from tests.unit.corpus.test_reading import line_of, read, texts

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def compress(content: bytes, suffix: str) -> bytes:
    """`content` in two frames, those of .xz with padding between them."""
    if suffix in _COMPRESS:
        padding = bytes(8) if suffix == ".xz" else b""
        return _COMPRESS[suffix](content[:100]) + padding + _COMPRESS[suffix](content[100:])
    compressor = zstandard.ZstdCompressor()
    streamed = io.BytesIO()
    with compressor.stream_writer(streamed, closefd=False) as writer:
        writer.write(content[100:])
    return compressor.compress(content[:100]) + streamed.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_of_several_frames_give_the_documents_of_their_content(tmp_path: Path, suffix: str) -> None:
    expected = [f"document {i} {os.urandom(50).hex()}" for i in range(3000)]
    content = b"".join(line_of(text, True) + b"\n" for text in expected)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content, suffix))
    records = read(tmp_path / f"a.jsonl{suffix}", chunk_bytes=100)
    assert texts(records) == expected
    assert [record.position for record in records[:2]] == [0, content.index(b"\n") + 1]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(content, suffix))
    assert texts(read(tmp_path / f"a.txt{suffix}")) == [content.decode()]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("cut", [1, 5, 2000])
def test_of_a_compressed_file_cut_short_the_documents_before_the_cut_stay_and_the_cut_is_named(
    tmp_path: Path, suffix: str, cut: int
) -> None:
    expected = [f"document {i} {os.urandom(500).hex()}" for i in range(1000)]
    content = b"".join(line_of(text, True) + b"\n" for text in expected)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content, suffix)[:-cut])
    *documents, bad = read(tmp_path / f"a.jsonl{suffix}")
    found = texts(documents)
    assert len(found) == len(documents) > 700
    assert found == expected[: len(found)]
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"
    assert bad.position == sum(len(line_of(text, True)) + 1 for text in found)
    assert bad.line == len(found) + 1
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(content, suffix)[:-cut])
    (bad,) = read(tmp_path / f"a.txt{suffix}")
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b'{"text": "plain"}\n')
    (bad,) = read(tmp_path / f"a.jsonl{suffix}")
    assert isinstance(bad, BadRecord)
    assert (bad.reason, bad.position) == ("damaged compression", 0)
