"""Compressed files as streams of their content, with an error where the content is cut short or damaged."""

import gzip
import io
import zlib
from typing import IO, Any

import zstandard

DAMAGED_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What reading a damaged stream raises, after all that precedes the damage was read."""


def decompressed(raw: IO[bytes], compression: str) -> IO[bytes]:
    """The content of `raw`, which is compressed by "gzip", "zstd" or "none"."""
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if compression == "zstd":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


class _ZstdReader(io.RawIOBase):
    """The content of all frames of a .zst file; EOFError if the last is cut short, which zstandard's reader hides."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._is_inside = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            block = self._frame.unused_data or self._raw.read(1 << 14)
            if self._frame.eof:
                self._frame, self._is_inside = self._decompressor.decompressobj(), False
            if not block:
                if self._is_inside:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._content, self._is_inside = memoryview(self._frame.decompress(block)), True
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size
