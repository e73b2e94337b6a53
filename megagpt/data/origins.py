"""Where the documents of a token dataset came from: `prefix.ids`, and the sources that the dataset's folder lists.

prefix.ids holds an ORIGIN for every document, in the order of the dataset: its id, which is "file index:position". The
index is a line of sources.jsonl, the position a byte offset in the file or, of a columnar one, a row.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.errors import UserError

ORIGIN = np.dtype([("file", "<u4"), ("position", "<u8")])
SOURCES_NAME = "sources.jsonl"

_BLOCK = 1 << 20  # entries that are looked at together


class DocumentId(NamedTuple):
    """What names a document, whatever became of it."""

    file: int
    """Index of its file among the sources."""
    position: int
    """Where it begins in the file: a byte of the uncompressed content, or a row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.position}"


def ids_path(prefix: str | Path) -> Path:
    """The file of ids of a dataset."""
    return Path(f"{prefix}.ids")


def open_ids(prefix: str | Path, documents: int) -> npt.NDArray[np.void] | None:
    """The ids (documents) of a dataset, mapped from its file; None: it has none, as datasets of other programs.

    UserError: the file cannot be read, or does not hold as many.
    """
    path = ids_path(prefix)
    try:
        size = path.stat().st_size
        if size != documents * ORIGIN.itemsize:
            raise UserError(
                f"{path}: {size} bytes, but {documents} documents take {documents * ORIGIN.itemsize}; copy it again"
            )
        return np.memmap(path, ORIGIN, mode="r") if size else np.empty(0, ORIGIN)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy it again") from error


def find_ids(ids: npt.NDArray[np.void], wanted: Collection[DocumentId]) -> Iterator[tuple[DocumentId, int]]:
    """Those of the `wanted` documents that are among `ids` (documents), with their numbers; in bounded memory."""
    positions = np.array(sorted({identifier.position for identifier in wanted}), np.uint64)
    for start in range(0, ids.size, _BLOCK):
        block = ids[start : start + _BLOCK]
        for place in np.flatnonzero(np.isin(block["position"], positions)).tolist():
            found = DocumentId(int(block["file"][place]), int(block["position"][place]))
            if found in wanted:
                yield found, start + place


def largest_file(ids: npt.NDArray[np.void]) -> int:
    """The largest index of a file that `ids` (documents) name; -1: there are none."""
    return max((int(ids["file"][start : start + _BLOCK].max()) for start in range(0, ids.size, _BLOCK)), default=-1)


def sources(folder: str | Path) -> Iterator[str]:
    """The names of the input files of the dataset in `folder`, by their index. UserError: they cannot be read."""
    path = Path(folder) / SOURCES_NAME
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["file"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; only datasets made by tools.preprocess know where their documents came from"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy it again") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a list of sources; copy it again") from None
