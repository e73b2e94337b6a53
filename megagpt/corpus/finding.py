"""Finding the input: the files that files, folders, patterns, lists of these and names on the hub lead to."""

import errno
import glob
import importlib.util
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, NoReturn

from megagpt.corpus.compression import DAMAGED_ERRORS, decompressed
from megagpt.corpus.hub import HUB_PREFIX, hub_files
from megagpt.corpus.sources import LIBRARIES_OF_KIND, Format, SourceFile, TextUnit, one_line
from megagpt.errors import UsageError, UserError

LIST_PREFIX = "@"
"""`@FILE` stands for the inputs that FILE lists, one a line; blank lines and those that begin with # are left out."""

_LONGEST_FIRST_LINE = 1 << 24  # of a .json file, that it may be known by
_DATASET_FILES = {"state.json", "dataset_info.json"}  # what tells a folder that `datasets` saved
_DATASET_DICT_FILE = "dataset_dict.json"  # lists the splits of several such folders


def find_files(
    inputs: Sequence[str], written: Sequence[Path] = (), format: Format = "auto", text_unit: TextUnit = "file"
) -> list[SourceFile]:
    """The files that `inputs` lead to, sorted by name, each once, read as `format`; texts by `text_unit`.

    An input is a file, a folder, a glob pattern, `@FILE` (a list of inputs) or `hf:NAME[:CONFIG][:SPLIT]` (see `hub`).
    Folders are read recursively, through links; names that begin with a dot are left out, as `*` does. Of a folder that
    `datasets` saved, the files of its data are read, and no others. What lies in `written`, the files and folders that
    the caller writes, is never input: it is left out, so that the same inputs mean the same files after a killed run.
    UserError: an input leads to no file, or cannot be read, or needs a library that is not installed.
    UsageError: an input leads to nothing but what is written. One of `written` itself, as a shell makes of `data/*`, is
    passed over if there is other input.
    """
    own = [os.path.realpath(path) for path in written]
    inputs = [name for pattern in inputs for name in _listed(pattern)]
    found: dict[str, SourceFile] = {}
    for pattern in inputs:
        for path, file in _find(pattern, own, format):
            _check_readable(file)
            found[path] = min(file, found.get(path, file), key=_precedence)
    if not found:
        raise _no_files(inputs[0], is_written=True)
    files = [replace(file, text_unit=text_unit) if file.kind == "text" else file for file in found.values()]
    return sorted(files, key=lambda file: file.name)


def _listed(pattern: str) -> list[str]:
    """The inputs that one stands for: those of a list, or it itself."""
    if not pattern.startswith(LIST_PREFIX):
        return [pattern]
    path = pattern.removeprefix(LIST_PREFIX)
    where = f"input {one_line(pattern)}"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        advice = f"give a file of inputs, one a line, or ./{path} if the file's name begins with @"
        raise UserError(f"{where}: the list cannot be read: {reason}; {one_line(advice)}") from error
    inputs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if nested := next((name for name in inputs if name.startswith(LIST_PREFIX)), None):
        raise UserError(f"{where}: lists {one_line(nested)}; a list cannot hold another; write ./@... if it is a file")
    if not inputs:
        raise UserError(f"{where}: the list names no input; write one a line")
    return inputs


def _find(pattern: str, own: Sequence[str], format: Format) -> list[tuple[str, SourceFile]]:
    """The files of one input, each after what is the same for all names of it."""
    if pattern.startswith(HUB_PREFIX):
        return [(file.name, file) for file in hub_files(pattern, format)]
    paths = [pattern] if os.path.lexists(pattern) else _matches(pattern)
    files = [pair for path in paths for pair in _expand(path, own, format)]
    if not files and os.path.realpath(pattern) not in own:
        raise _no_files(pattern, any(_is_within(os.path.realpath(path), own) for path in paths))
    return files


def _matches(pattern: str) -> list[str]:
    """The paths that match as `glob` has it, but that `**` enters each folder once, though links may lead back up."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    before, after = parts[:place], parts[place + 1 :]
    while after[:1] == ["**"]:
        after = after[1:]
    roots = glob.glob("/".join([*before, ""])) if before else ["."]
    folders = [folder for root in roots for folder, _ in _folders(root, ())]
    return [path for folder in folders for path in _matches("/".join([glob.escape(folder), *(after or ["*"])]))]


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


def _expand(path: str, own: Sequence[str], format: Format) -> Iterator[tuple[str, SourceFile]]:
    """The files of one path, each after its real path."""
    path = str(Path(path))  # not os.path.normpath, which is wrong about `link/..`
    is_folder = os.path.isdir(path)
    for name in _walk(path, own) if is_folder else [path]:
        real = os.path.realpath(name)
        if not _is_within(real, own):
            yield real, _describe(name, is_folder, format)


def _walk(root: str, own: Sequence[str]) -> Iterator[str]:
    """The files in a folder and those below."""
    for folder, names in _folders(root, own):
        for name in _data_files(folder) if _DATASET_FILES.issubset(names) else names:
            if name != _DATASET_DICT_FILE and not name.startswith("."):
                yield os.path.join(folder, name)


def _folders(root: str, own: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below, each once, with the names of their files; without hidden ones and what is `own`."""
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
        yield parent, names


def _data_files(folder: str) -> list[str]:
    """The names of the data files in a folder that `datasets` saved, which may hold cached ones as well."""
    path = os.path.join(folder, "state.json")
    try:
        with open(path, encoding="utf-8") as file:
            return [_checked_name(entry["filename"]) for entry in json.load(file)["_data_files"]]
    except OSError as error:
        _cannot_read(error)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"input {one_line(path)}: is not as datasets.save_to_disk writes it; save the dataset again"
        ) from error


def _checked_name(name: object) -> str:
    """ValueError: it is not the name of a file."""
    if not isinstance(name, str) or name != os.path.basename(name) or b"\0" in os.fsencode(name) or not name:
        raise ValueError(name)
    return name


def _describe(path: str, found_in_folder: bool, format: Format) -> SourceFile:
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
    if not os.access(path, os.R_OK):
        raise UserError(f"input {one_line(path)}: cannot be read: {os.strerror(errno.EACCES)}")
    file = SourceFile(path, status.st_size, status.st_mtime_ns, found_in_folder, format=format)
    return _with_known_json(file) if file.may_be_json and file.size else file


def _with_known_json(file: SourceFile) -> SourceFile:
    """A .json file, known as a record a line, or else, met in a folder, as a text: source code has such files.

    UserError: it was named, and is not a record a line.
    """
    try:
        if _has_records(file):
            return replace(file, format="jsonl")
    except DAMAGED_ERRORS:
        return replace(file, format="jsonl")  # whose reader tells the damage
    except OSError as error:
        _cannot_read(error)
    if file.found_in_folder:
        return file
    advice = "write it so (jq -c '.[]' does, for an array), or say what it is with --format jsonl or text"
    raise UserError(f"input {one_line(file.name)}: is not JSON with one record a line; {advice}")


def _has_records(file: SourceFile) -> bool:
    """Whether its first line is a whole object; if it was met in a folder, and may be code, the second one, too."""
    with open(file.name, "rb") as raw:
        stream = decompressed(raw, file.compression)
        stream = io.BufferedReader(stream, 1 << 16) if isinstance(stream, io.RawIOBase) else stream
        first = _next_line(stream).removeprefix(b"\xef\xbb\xbf")
        try:
            is_object = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False
        return is_object and (not file.found_in_folder or _next_line(stream).startswith(b"{"))


def _next_line(stream: IO[bytes]) -> bytes:
    """The next line that is not blank, or its beginning."""
    while line := stream.readline(_LONGEST_FIRST_LINE):
        if not line.isspace():
            return line
    return b""


def _check_readable(file: SourceFile) -> None:
    """UserError: what reads such files cannot read this one, or is not installed."""
    where = f"input {one_line(file.name)}"
    if file.is_columnar and file.compression != "none":
        raise UserError(f"{where}: {file.kind} files cannot be read through {file.compression}; decompress it")
    if file.is_table and not file.found_in_folder:
        advice = "write the texts to .jsonl or Parquet, or, if the file itself is a text, give --format text"
        raise UserError(f"{where}: tables such as .csv and .tsv are not supported; {advice}")
    for library in LIBRARIES_OF_KIND.get(file.kind, ()):
        if not file.obstacle and importlib.util.find_spec(library) is None:
            raise UserError(f"{where}: reading it needs {library}; install it with pip install 'megagpt[web]'")


def _cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"input {one_line(error.filename)}: cannot be read: {error.strerror}") from error
