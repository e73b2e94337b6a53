"""Compressed files as streams of their content, with an error where the content is cut short or damaged."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import zstandard

from megagpt.corpus.sources import Compression

DAMAGED_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged stream raises, after all that precedes the damage was read."""


class _Decompressor(Protocol):
    """Of one frame, as the standard library's modules and zstandard have it."""

    @property
    def eof(self) -> bool:
        """Whether the frame is complete."""

    @property
    def unused_data(self) -> bytes:
        """What follows it, of the data given."""

    def decompress(self, data: bytes, /) -> bytes:
        """The content that `data` adds."""


def decompressed(raw: IO[bytes], compression: Compression) -> IO[bytes]:
    """The content of `raw`, all its frames, one after another."""
    match compression:
        case "none":
            return raw
        case "gzip":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw))
        case "zstd":
            return io.BufferedReader(_FrameReader(raw, _zstd_decompressor))
        case "bzip2":
            return io.BufferedReader(_FrameReader(raw, bz2.BZ2Decompressor))
        case "xz":
            return io.BufferedReader(_FrameReader(raw, lzma.LZMADecompressor))


def _zstd_decompressor() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _FrameReader(io.RawIOBase):
    """The content of all frames of a file; EOFError if the last is cut short.

    The libraries' own readers hide that (zstandard), or take damage after the first frame for its end (bz2, lzma).
    """

    def __init__(self, raw: IO[bytes], new_decompressor: Callable[[], _Decompressor]) -> None:
        self._raw = raw
        self._new_decompressor = new_decompressor
        self._frame = new_decompressor()
        self._is_inside = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            block = self._frame.unused_data or self._raw.read(1 << 14)
            if self._frame.eof:
                self._frame, self._is_inside = self._new_decompressor(), False
            if not block:
                if self._is_inside:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if not self._is_inside:
                block = block.lstrip(b"\0")  # padding between frames, as xz allows
            if block:
                self._content, self._is_inside = memoryview(self._decompress(block)), True
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def _decompress(self, block: bytes) -> bytes:
        try:
            return self._frame.decompress(block)
        except OSError as error:  # bz2's word for damage
            raise EOFError(str(error)) from None
