"""Compressed files: all of their content comes out, also what precedes damage, and the damage is named."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard

from megagpt.corpus.compression import decompressed
from megagpt.corpus.records import BadRecord
from megagpt.corpus.sources import Compression
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


_BYTEWISE: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


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


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_no_document_before_a_damaged_byte_is_lost_that_a_decompressor_can_give(tmp_path: Path, suffix: str) -> None:
    """What can be given: what the library gives when it gets the file byte by byte."""
    rng = random.Random(4)
    content = b"".join(line_of(f"{number} {rng.randbytes(200).hex()}", True) + b"\n" for number in range(3000))
    compressed = bytearray(compress(content, suffix))
    place = int(0.7 * len(compressed))
    compressed[place : place + 20] = bytes(20)
    known, at = bytearray(), 0
    decompressor = _BYTEWISE[suffix]()
    with contextlib.suppress(zlib.error, lzma.LZMAError, OSError, EOFError, zstandard.ZstdError):
        while at < len(compressed):
            known += decompressor.decompress(compressed[at : at + 1])
            at += 1
            if decompressor.eof:
                at -= len(decompressor.unused_data)
                while at < len(compressed) and not compressed[at]:  # padding
                    at += 1
                decompressor = _BYTEWISE[suffix]()
    assert at < len(compressed)  # it met the damage
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed)
    records = read(tmp_path / f"a.jsonl{suffix}")
    assert isinstance(records[-1], BadRecord)
    assert records[-1].reason == "damaged compression"
    assert len(records) - 1 == known.count(b"\n")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("size", [1, 100, 1 << 16, (1 << 18) + 1, 3_000_000])
def test_content_of_any_size_comes_out_whole(suffix: str, size: int) -> None:
    content = random.Random(size).randbytes(size // 2) + bytes(size - size // 2)
    names = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
    stream = decompressed(io.BytesIO(compress(content, suffix)), cast(Compression, names[suffix]))
    parts = list(iter(lambda: stream.read(70_001), b""))
    assert b"".join(parts) == content
