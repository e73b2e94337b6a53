"""The input of a corpus: the files that files, folders and patterns lead to, and the pieces that they are read in."""

import glob
import importlib.util
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from megagpt.errors import UsageError, UserError

Compression = Literal["none", "gzip", "zstd", "bzip2", "xz"]
Kind = Literal["text", "jsonl", "html", "warc", "parquet", "arrow"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".warc", ".wet", ".wat"), "warc"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
LIBRARIES_OF_KIND: dict[Kind, tuple[str, ...]] = {"html": ("resiliparse",), "warc": ("fastwarc", "resiliparse")}
"""What the extra `web` installs to read files of some kinds; it shapes their documents."""


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when the run was planned."""

    name: str
    """Its path, as the user's input led to it."""
    size: int
    """Bytes on disk."""
    mtime_ns: int
    """Time of the last change."""
    found_in_folder: bool
    """Whether it was met by walking a folder, and not named by the user: then it may be binary, or no regular file."""
    obstacle: str = ""
    """Why it cannot be read as a file, such as a link to nothing; empty: it can."""

    @property
    def compression(self) -> Compression:
        """How the file is compressed, by its name."""
        return _COMPRESSIONS.get(Path(self.name).suffix.lower(), "none")

    @property
    def kind(self) -> Kind:
        """What the file holds, by its name: `jsonl` one document a line, `text` and `html` one document, ..."""
        path = Path(self.name)
        inner = path.name if self.compression == "none" else path.stem
        return _KINDS.get(Path(inner).suffix.lower(), "text")

    @property
    def is_columnar(self) -> bool:
        """Whether positions are numbers of rows, and not of bytes."""
        return self.kind in ("parquet", "arrow")

    @property
    def is_splittable(self) -> bool:
        """Whether a range of its bytes can be read alone."""
        return self.kind == "parquet" or (self.kind == "jsonl" and self.compression == "none")


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


_DATASET_FILES = {"state.json", "dataset_info.json"}  # what tells a folder that `datasets` saved
_DATASET_DICT_FILE = "dataset_dict.json"  # lists the splits of several such folders


def one_line(path: object) -> str:
    """A path for a message: as it is, or, with line breaks or other characters that are not printable, quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))


def find_files(inputs: Sequence[str], written: Sequence[Path] = ()) -> list[SourceFile]:
    """The files that `inputs` (files, folders, glob patterns) lead to, sorted by path, each once.

    Folders are read recursively, through links; names that begin with a dot are left out, as `*` does. Of a folder that
    `datasets` saved, the files of its data are read, and no others. What lies in `written`, the files and folders that
    the caller writes, is never input: it is left out, so that the same inputs mean the same files after a killed run.
    UserError: an input leads to no file, or cannot be read, or needs a library that is not installed.
    UsageError: an input leads to nothing but what is written. One of `written` itself, as a shell makes of `data/*`, is
    passed over if there is other input.
    """
    own = [os.path.realpath(path) for path in written]
    found: dict[str, SourceFile] = {}
    for pattern in inputs:
        paths = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        files = [pair for path in paths for pair in _expand(path, own)]
        if not files and os.path.realpath(pattern) not in own:
            raise _no_files(pattern, any(_is_within(os.path.realpath(path), own) for path in paths))
        for path, file in files:
            found[path] = min(file, found.get(path, file), key=_precedence)
    if not found:
        raise _no_files(inputs[0], is_written=True)
    return sorted(found.values(), key=lambda file: file.name)


def _precedence(file: SourceFile) -> tuple[bool, bool, str]:
    """Of several names of one file the first by this stands for it: named by the user, of a known kind."""
    return file.found_in_folder, file.kind == "text", file.name


def _no_files(pattern: str, is_written: bool) -> UserError:
    where = f"input {one_line(pattern)}"
    if is_written:
        return UsageError(f"{where}: lies in what this run itself writes; choose other input, or other output folders")
    kind = "the folder holds no files" if os.path.isdir(pattern) else "no such file, folder or match"
    return UserError(f"{where}: {kind}; check the path, and quote patterns")


def _is_within(path: str, folders: Sequence[str]) -> bool:
    return any(f"{path}/".startswith(f"{folder}/") for folder in folders)


def _expand(path: str, own: Sequence[str]) -> Iterator[tuple[str, SourceFile]]:
    """The files of one path, each after its real path."""
    path = str(Path(path))  # not os.path.normpath, which is wrong about `link/..`
    is_folder = os.path.isdir(path)
    for name in _walk(path, own) if is_folder else [path]:
        real = os.path.realpath(name)
        if not _is_within(real, own):
            yield real, _describe(name, found_in_folder=is_folder)


def _walk(root: str, own: Sequence[str]) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()  # a link can lead back up

    def is_new(folder: str) -> bool:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen or _is_within(os.path.realpath(folder), own):
            return False
        seen.add(identity)
        return True

    if not is_new(root):
        return
    for parent, folders, names in os.walk(root, onerror=_cannot_read, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if is_new(os.path.join(parent, name))]
        for name in _data_files(parent) if _DATASET_FILES.issubset(names) else names:
            if name != _DATASET_DICT_FILE and not name.startswith("."):
                yield os.path.join(parent, name)


def _data_files(folder: str) -> list[str]:
    """The names of the data files in a folder that `datasets` saved, which may hold cached ones as well."""
    path = os.path.join(folder, "state.json")
    try:
        with open(path, encoding="utf-8") as file:
            return [entry["filename"] for entry in json.load(file)["_data_files"]]
    except OSError as error:
        _cannot_read(error)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"input {one_line(path)}: is not as datasets.save_to_disk writes it; save the dataset again"
        ) from error


def _describe(path: str, found_in_folder: bool) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError as error:
        if found_in_folder and os.path.islink(path):
            return SourceFile(path, 0, 0, found_in_folder, f"a link that leads nowhere: {error.strerror}")
        _cannot_read(error)
    if not stat.S_ISREG(status.st_mode):
        if found_in_folder:
            return SourceFile(path, 0, 0, found_in_folder, "a pipe, socket or device")
        raise UserError(f"input {one_line(path)}: not a regular file; write its content to one first")
    file = SourceFile(path, status.st_size, status.st_mtime_ns, found_in_folder)
    where = f"input {one_line(path)}"
    if file.is_columnar and file.compression != "none":
        raise UserError(f"{where}: {file.kind} files cannot be read through {file.compression}; decompress it")
    for library in LIBRARIES_OF_KIND.get(file.kind, ()):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{where}: reading it needs {library}; install it with pip install 'megagpt[web]'")
    return file


def _cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"input {one_line(error.filename)}: cannot be read: {error.strerror}") from error
