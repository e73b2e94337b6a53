"""Compressed files as streams of their content, with an error where the content is cut short or damaged.

All that precedes the damage is given first. No more than 64 MiB of content is held at once, whatever a few bytes expand
to; beside it a decompressor holds its window, as far as it is filled: 32 KiB of gzip, up to 2 GiB of zstd (8 MiB unless
--long was given; dumps of Reddit have --long=31) and up to 1.5 GiB of xz (64 MiB with -9).
"""

import bz2
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Protocol, cast

import zstandard

from megagpt.corpus.sources import Compression

DAMAGED_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged stream raises, after all that precedes the damage was read."""

_READ_BYTES = 1 << 16  # compressed, at once
_MOST_CONTENT = 1 << 18  # of one call of a decompressor
_MOST_BZIP2_CONTENT = 1 << 26  # more than any block expands to: a call gives a block after its checksum, or an error
_ZSTD_BYTES = 1 << 11  # zstandard has no bound for the content of a call; from these at most 64 MiB can come
_FRAMES_REMEMBERED = 1 << 12  # more than a reader may be ahead of the record that it gives
_GZIP_MAGIC = b"\x1f\x8b\x08"


class _Frame(Protocol):
    """What decompresses one frame, as the standard library's modules have it."""

    @property
    def eof(self) -> bool:
        """Whether the frame is complete."""

    @property
    def needs_input(self) -> bool:
        """Whether there is no more content without more data."""

    @property
    def unused_data(self) -> bytes:
        """What follows the frame, of the data given."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Some of the content that follows, given more data."""


def decompressed(raw: IO[bytes], compression: Compression) -> IO[bytes]:
    """The content of `raw`, which can seek: all its frames, one after another; a FrameReader if it is compressed.

    Not buffered: a buffer would lose what is in it at damage.
    """
    if compression == "none":
        return raw
    return cast(IO[bytes], FrameReader(raw, _NEW_FRAME[compression]))  # a raw stream has all that is used of one


class _GzipFrame:
    """A member of a gzip file."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        """See _Frame."""
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        """See _Frame."""
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """See _Frame."""
        tail = self._object.unconsumed_tail
        content = self._object.decompress(tail + data if tail else data, max_length)
        self.needs_input = len(content) < max_length and not self._object.unconsumed_tail
        return content


class _ZstdFrame:
    """A frame of a Zstandard file."""

    def __init__(self) -> None:
        self._object = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._data = b""
        self._place = 0  # of what was not yet decompressed

    @property
    def eof(self) -> bool:
        """See _Frame."""
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        """See _Frame."""
        return self._place >= len(self._data)

    @property
    def unused_data(self) -> bytes:
        """See _Frame."""
        return self._object.unused_data + self._data[self._place :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """See _Frame; `max_length` is not kept."""
        if data:
            self._data, self._place = self._data[self._place :] + data, 0
        block = self._data[self._place : self._place + _ZSTD_BYTES]
        self._place += len(block)
        return self._object.decompress(block)


_NEW_FRAME: dict[Compression, Callable[[], _Frame]] = {
    "gzip": _GzipFrame,
    "zstd": _ZstdFrame,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class FrameReader(io.RawIOBase):
    """The content of all frames of a file; EOFError if the last is cut short.

    The libraries' own readers hide that (zstandard), take damage after the first frame for its end (bz2, lzma), or lose
    the content before the damage. Here a damaged frame is decompressed again up to the damage, byte by byte at the end.
    """

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], _Frame]) -> None:
        self._raw = raw
        self._new_frame = new_frame
        self._most_content = _MOST_BZIP2_CONTENT if new_frame is bz2.BZ2Decompressor else _MOST_CONTENT
        self._content = memoryview(b"")
        self._data = b""  # read, and not yet given to a frame
        self._offset = 0  # of the content, of what is given next
        self._starts: deque[tuple[int, int]] = deque(
            maxlen=_FRAMES_REMEMBERED
        )  # of frames: in the content, in the file
        self._begin_frame(0)

    def _begin_frame(self, offset: int) -> None:
        """A frame, or the padding before it, begins at this byte of the file."""
        self._frame = self._new_frame()
        self._start = offset
        self._fed = self._given = 0  # bytes of the frame: compressed, and of content
        self._safe_fed = 0  # compressed bytes from which all content was given
        self._repeated = 0  # bytes of content that were given before the frame was begun again
        self._bytes_at_once = _READ_BYTES

    @property
    def given(self) -> int:
        """Bytes of content that were read from it."""
        return self._offset

    def readable(self) -> bool:
        """As io.RawIOBase has it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As io.RawIOBase has it."""
        while not self._content:
            if self._frame.eof:
                rest = self._frame.unused_data
                self._data = rest + self._data
                self._begin_frame(self._start + self._fed - len(rest))
            block = self._next_block() if self._frame.needs_input else b""
            if not block and self._frame.needs_input:
                if self._fed:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._decompress(block)
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        self._offset += size
        return size

    def _next_block(self) -> bytes:
        while True:
            data = self._data or self._raw.read(_READ_BYTES)
            block, self._data = data[: self._bytes_at_once], data[self._bytes_at_once :]
            if self._fed or not block:
                return block
            begin = block.lstrip(b"\0")  # padding between frames, as xz allows
            self._start += len(block) - len(begin)
            if begin:
                self._starts.append((self._offset, self._start))
                return begin

    def _decompress(self, block: bytes) -> None:
        try:
            content = self._decompressed(block)
        except DAMAGED_ERRORS:
            if self._bytes_at_once == 1:
                raise
            self._begin_again()
            return
        self._fed += len(block)
        repeated = min(self._repeated, len(content))
        self._repeated -= repeated
        self._given += len(content) - repeated
        self._content = memoryview(content)[repeated:]
        if self._frame.needs_input:
            self._safe_fed = self._fed

    def _decompressed(self, block: bytes) -> bytes:
        try:
            return self._frame.decompress(block, self._most_content)
        except OSError as error:  # bz2's word for damage
            raise EOFError(str(error)) from None

    def _begin_again(self) -> None:
        """Bring a new frame to where the old one had given all content, from where it goes on byte by byte."""
        given, safe = self._given, self._safe_fed
        self._raw.seek(self._start)
        self._data = b""
        self._begin_frame(self._start)
        passed = 0
        while self._fed < safe or not self._frame.needs_input:
            block = self._raw.read(min(_READ_BYTES, safe - self._fed)) if self._frame.needs_input else b""
            passed += len(self._decompressed(block))
            self._fed += len(block)
        self._given, self._safe_fed, self._repeated = given, safe, given - passed
        self._bytes_at_once = 1

    def skip_damage(self, beginning: bytes, offset: int) -> int | None:
        """Go on at the next gzip member with this beginning of its content, after the one of the content's `offset`.

        Returns the offset of its content; after damage, that is as if nothing had been between. None: there is none.
        """
        if self._new_frame is not _GzipFrame:
            return None
        start = max((start for content, start in self._starts if content <= offset), default=self._start)
        place = start + 1
        while len(window := self._window(place)) > len(_GZIP_MAGIC):
            found = window.find(_GZIP_MAGIC)
            if found < 0:
                place += len(window) - len(_GZIP_MAGIC) + 1
            elif self._begins_with(place + found, beginning):
                self._go_to(place + found)
                return self._offset
            else:
                place += found + 1
        return None

    def _window(self, place: int) -> bytes:
        self._raw.seek(place)
        return self._raw.read(_READ_BYTES)

    def _go_to(self, start: int) -> None:
        self._offset = next((content for content, known in self._starts if known == start), self._offset)
        self._starts = deque([pair for pair in self._starts if pair[1] < start], self._starts.maxlen)
        self._raw.seek(start)
        self._data, self._content = b"", memoryview(b"")
        self._begin_frame(start)

    def _begins_with(self, offset: int, beginning: bytes) -> bool:
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            return member.decompress(self._window(offset), len(beginning)) == beginning
        except zlib.error:
            return False
