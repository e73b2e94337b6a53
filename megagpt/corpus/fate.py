"""What became of a document: its id looked up in the lists of a dataset's folder.

Every list is read once for all ids that are asked for, in blocks: time grows with the lists, memory does not.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megagpt.corpus.quarantine import QUARANTINE_NAME, place
from megagpt.corpus.removed import REMOVED_NAME
from megagpt.data.indexed import IndexedDataset
from megagpt.data.origins import SOURCES_NAME, DocumentId, find_ids, ids_path, open_ids, sources
from megagpt.errors import UsageError, UserError

_COMPRESSED_BLOCK = 1 << 17  # bytes of the compressed list read at once
_LINE_BEGIN = b'{"id": "'


@dataclass(frozen=True)
class Kept:
    """It is in the dataset."""

    prefix: str
    """Prefix of the dataset of its split."""
    number: int
    """Its number there, from 0."""


@dataclass(frozen=True)
class Removed:
    """A stage removed it."""

    stage: str
    reason: str
    detail: str
    survivor: DocumentId | None
    """The document that stays in its stead; None: none does."""
    survivor_file: str
    """Name of that one's file."""
    similarity: float | None
    """Estimated similarity to it, 0 to 1."""
    kept: Kept | None
    """Where that one is."""


@dataclass(frozen=True)
class Unreadable:
    """It could not be read."""

    reason: str
    detail: str
    place: str
    """Where it is in its file, in words."""


@dataclass(frozen=True)
class Fate:
    """One document and what became of it."""

    id: DocumentId
    file: str
    """Name of its file."""
    outcome: Kept | Removed | Unreadable | None
    """None: the run met no document there."""


def find_fates(folder: Path, names: Sequence[str]) -> list[Fate]:
    """What became of documents, each named by its id, FILE INDEX:POSITION, or FILE NAME:POSITION.

    UsageError: a name is neither. UserError: the dataset in `folder` has no ids, or one of its lists is damaged.
    """
    wanted = _parse(folder, names)
    _file_names(folder, {identifier.file for identifier in wanted})  # an error now, and not after all lists are read
    removed = dict(_find_removed(folder / REMOVED_NAME, wanted))
    survivors = {identifier: _survivor(record) for identifier, record in removed.items()}
    every_id = {*wanted, *(survivor for survivor in survivors.values() if survivor)}
    kept = dict(_find_kept(folder, every_id))
    files = _file_names(folder, {identifier.file for identifier in every_id})
    lost = {identifier for identifier in wanted if identifier not in kept and identifier not in removed}
    places = {(files[identifier.file], identifier.position): identifier for identifier in lost}
    unreadable = dict(_find_unreadable(folder / QUARANTINE_NAME, places))

    def outcome(identifier: DocumentId) -> Kept | Removed | Unreadable | None:
        if record := removed.get(identifier):
            survivor = survivors[identifier]
            return Removed(
                record["stage"],
                record["reason"],
                record["detail"],
                survivor,
                files[survivor.file] if survivor else "",
                record["similarity"],
                kept.get(survivor) if survivor else None,
            )
        return kept.get(identifier) or unreadable.get(identifier)

    return [Fate(identifier, files[identifier.file], outcome(identifier)) for identifier in wanted]


# Names


def _parse(folder: Path, names: Sequence[str]) -> list[DocumentId]:
    """The ids that are meant, in the order of `names`."""
    parts = []
    for name in names:
        file, _, position = name.rpartition(":")
        if not file or not _is_number(position):
            raise UsageError(
                f"--find {name}: not an id; give FILE:POSITION, the file by its name or its line in {SOURCES_NAME} "
                "from 0, as 0:1234"
            )
        parts.append((file, int(position)))
    by_name = _indices(folder, {file for file, _ in parts if not _is_number(file)})
    return [DocumentId(int(file) if _is_number(file) else by_name[file], position) for file, position in parts]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 1 << 64


def _indices(folder: Path, names: Collection[str]) -> dict[str, int]:
    """The indices of files that are named in full, or by the end of their path if only one has it."""
    full: dict[str, int] = {}
    ends: dict[str, list[int]] = {name: [] for name in names}
    for index, source in enumerate(sources(folder) if names else ()):
        for name in names:
            if source == name:
                full[name] = index
            elif source.endswith(f"/{name}"):
                ends[name].append(index)
    for name in names:
        if name not in full:
            if len(ends[name]) != 1:
                found = f"{len(ends[name])} of its files end so" if ends[name] else "not among its files"
                raise UsageError(f"--find {name}: {found}; give the name of one as {folder / SOURCES_NAME} has it")
            full[name] = ends[name][0]
    return full


def _file_names(folder: Path, indices: Collection[int]) -> dict[int, str]:
    names = {}
    count = 0
    for index, name in enumerate(sources(folder)):
        count += 1
        if index in indices:
            names[index] = name
    for index in indices:
        if index not in names:
            raise UsageError(f"{folder / SOURCES_NAME}: lists {count} files, numbered from 0; there is no file {index}")
    return names


# Lists


def _find_kept(folder: Path, wanted: Collection[DocumentId]) -> Iterator[tuple[DocumentId, Kept]]:
    for index in sorted(folder.glob("*.idx")):
        prefix = index.with_suffix("")
        ids = open_ids(prefix, IndexedDataset(prefix).num_documents)
        if ids is None:
            raise UserError(f"{ids_path(prefix)}: no such file; without it documents cannot be found; copy it again")
        for identifier, number in find_ids(ids, wanted):
            yield identifier, Kept(str(prefix), number)


def _find_removed(path: Path, wanted: Collection[DocumentId]) -> Iterator[tuple[DocumentId, dict[str, Any]]]:
    begins = {identifier: _LINE_BEGIN + f'{identifier}"'.encode() for identifier in wanted}
    for block in _blocks_of_lines(path):
        if block.count(b"\n" + _LINE_BEGIN) + block.startswith(_LINE_BEGIN) != block.count(b"\n"):
            raise _damaged(path)
        for identifier, begin in begins.items():
            start = block.find(begin)  # never within a line: quotes in strings of JSON have a backslash
            if start >= 0:
                yield identifier, _removed_record(path, block[start : block.index(b"\n", start)])


def _removed_record(path: Path, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not {"stage", "reason", "detail", "survivor", "similarity"} <= record.keys():
        raise _damaged(path)
    return record


def _survivor(record: dict[str, Any]) -> DocumentId | None:
    if record["survivor"] is None:
        return None
    file, _, position = record["survivor"].partition(":")
    return DocumentId(int(file), int(position))


def _blocks_of_lines(path: Path) -> Iterator[bytes]:
    """The content of a zstandard file, cut behind ends of lines. UserError: it is damaged, or cannot be read."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    try:
        with open(path, "rb") as file:
            while compressed := file.read(_COMPRESSED_BLOCK):
                block, newline, tail = decompressor.decompress(compressed).rpartition(b"\n")
                if newline:
                    yield rest + block + newline
                    rest = tail
                else:
                    rest += tail
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy it again") from error
    except zstandard.ZstdError:
        raise _damaged(path) from None
    if rest or not decompressor.eof or decompressor.unused_data:
        raise _damaged(path)


def _find_unreadable(path: Path, wanted: dict[tuple[str, int], DocumentId]) -> Iterator[tuple[DocumentId, Unreadable]]:
    """`wanted`: ids by name of file and position."""
    names = [json.dumps(name) for name in {name for name, _ in wanted}]
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines if wanted else ():
                if any(name in line for name in names):
                    record = json.loads(line)
                    position = record["row"] if record["byte"] is None else record["byte"]
                    if identifier := wanted.get((record["file"], position)):
                        yield identifier, Unreadable(record["reason"], record["detail"], place(record))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy it again") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: not the list that tools.preprocess wrote; copy it again")
