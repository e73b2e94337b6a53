"""The input of a corpus: its files, what they hold, and the pieces that they are read in."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Compression = Literal["none", "gzip", "zstd", "bzip2", "xz"]
Kind = Literal["text", "jsonl", "html", "warc", "parquet", "arrow", "mediawiki"]
Format = Literal["auto", "text", "jsonl", "html", "warc", "parquet", "arrow", "mediawiki"]
"""What the user says that all files hold; auto: what their names tell."""

TextUnit = Literal["file", "line", "paragraph"]
"""What of a text file is a document: all of it, each line, or each run of lines between empty ones."""

HUB_SCHEME = "hf://"

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".warc", ".wet", ".wat"), "warc"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
_TABLES = (".csv", ".tsv")
_DUMP_NAME = re.compile(r"pages-(articles|meta-current).*\.xml(-p\d+p\d+)?$")  # of a wiki's pages, or some of them
LIBRARIES_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "html": ("resiliparse",),
    "warc": ("fastwarc", "resiliparse"),
    "mediawiki": ("mwparserfromhell",),
}
"""What the extra `web` installs to read files of some kinds; it shapes their documents."""


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when the run was planned."""

    name: str
    """Its path, as the user's input led to it; of a file on the hub its URL hf://datasets/NAME@COMMIT/PATH."""
    size: int
    """Bytes as stored."""
    mtime_ns: int
    """Time of the last change; 0 on the hub, where the commit stands for it."""
    found_in_folder: bool
    """Whether it was met by walking a folder, and not named by the user: then it may be binary, or no regular file."""
    obstacle: str = ""
    """Why it cannot be read as a file, such as a link to nothing; empty: it can."""
    format: Format = "auto"
    """What it holds, whatever its name says."""
    text_unit: TextUnit = "file"
    """What of it is a document, if it holds text."""

    @property
    def identity(self) -> list[str | int | bool]:
        """What tells it from another file, and from itself before a change."""
        return [self.name, self.size, self.mtime_ns, self.found_in_folder, self.obstacle, self.kind, self.text_unit]

    @property
    def is_on_hub(self) -> bool:
        """Whether it is read over the network from the Hugging Face hub."""
        return self.name.startswith(HUB_SCHEME)

    @property
    def compression(self) -> Compression:
        """How the file is compressed, by its name."""
        return _COMPRESSIONS.get(PurePosixPath(self.name).suffix.lower(), "none")

    @property
    def kind(self) -> Kind:
        """What the file holds: `jsonl` one document a line, `text` and `html` one document, ..."""
        if self.format != "auto":
            return self.format
        if _DUMP_NAME.search(self._inner_name):
            return "mediawiki"
        return _KINDS.get(PurePosixPath(self._inner_name).suffix, "text")

    @property
    def _inner_name(self) -> str:
        """The name in lower case, without folders and the suffix of a compression."""
        path = PurePosixPath(self.name)
        return (path.name if self.compression == "none" else path.stem).lower()

    @property
    def may_be_json(self) -> bool:
        """Whether only its content tells if it is a record a line, or a text."""
        return self.format == "auto" and self._inner_name.endswith(".json")

    @property
    def is_table(self) -> bool:
        """Whether it holds comma-separated values or the like, of which no reader knows what is text."""
        return self.format == "auto" and self._inner_name.endswith(_TABLES)

    @property
    def is_in_lines(self) -> bool:
        """Whether each line is a record."""
        return self.kind == "jsonl" or (self.kind == "text" and self.text_unit == "line")

    @property
    def is_columnar(self) -> bool:
        """Whether positions are numbers of rows, and not of bytes."""
        return self.kind in ("parquet", "arrow")

    @property
    def is_splittable(self) -> bool:
        """Whether a range of its bytes can be read alone."""
        return self.kind == "parquet" or self.can_begin_anywhere

    @property
    def can_begin_anywhere(self) -> bool:
        """Whether any range of its bytes can be read alone, in a time by its size."""
        is_text = self.kind == "text" and self.text_unit != "file"
        return self.compression == "none" and (self.kind == "jsonl" or is_text)


@dataclass(frozen=True)
class Piece:
    """The documents of a file that begin in a range of its bytes."""

    file: SourceFile
    file_index: int
    """Number of the file in the plan."""
    start: int
    stop: int
    """The first byte after the range; for a file that cannot be split, its size."""

    def __str__(self) -> str:
        whole = (self.start, self.stop) == (0, self.file.size)
        return one_line(self.file.name) + ("" if whole else f" bytes {self.start}-{self.stop}")


def one_line(path: object) -> str:
    """A path for a message: as it is, or, with line breaks or other characters that are not printable, quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))
