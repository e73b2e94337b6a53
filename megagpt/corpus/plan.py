"""The plan of a run: every file, how the input is cut into chunks, and the hash that names all that shapes the result.

A chunk is what one task reads: some whole files, or a range of bytes of a large one. How the input is cut never
changes the result: documents are numbered by file and position, and each belongs to exactly one chunk.
"""

import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megagpt
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.decontaminate import evaluation_files
from megagpt.corpus.finding import find_files
from megagpt.corpus.sources import LIBRARIES_OF_KIND, Kind, Piece, SourceFile
from megagpt.tokenizer import Tokenizer

PIPELINE_VERSION = 3
"""Part of every plan's hash; raised when a change of the code changes what comes out."""

_LIBRARIES = ("datasketch", "ftfy", "numpy", "orjson", "py3langid", "scipy", "tiktoken", "xxhash", "zstandard")
_LIBRARIES_OF_COLUMNS = ("pyarrow",)  # always installed, and of no matter for other files
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1 << 22, 1 << 26
_FILE_BYTES = 1 << 12  # to open a file takes as long as to read so much: many small ones are work for several workers
_MOST_CHUNKS = 1 << 14  # beyond which chunks grow


@dataclass(frozen=True)
class Chunk:
    """The input of one task, in order."""

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        more = len(self.pieces) - 1
        return f"{self.pieces[0]} to {self.pieces[-1]} ({len(self.pieces)} pieces)" if more else str(self.pieces[0])


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before it does anything."""

    files: list[SourceFile]
    """The input; a file's index here is the first half of its documents' ids."""
    evaluation: list[SourceFile]
    """The files whose text must not be trained on."""
    chunks: list[Chunk]
    chunk_bytes: int
    config: dict[str, Any]
    """What of the configuration shapes the result."""
    versions: dict[str, str]
    """Versions of the libraries that shape the result."""
    hash: str
    """sha256 of files, configuration, tokenizer and versions, in hexadecimal digits."""


def make_plan(config: CorpusConfig, tokenizer: Tokenizer, written: Sequence[Path] = ()) -> Plan:
    """Find the input, leaving out the folders `written` by the run, and plan the run.

    A file counts as changed if its path, size or time of change differs.
    UserError: the input cannot be found or read.
    """
    files = find_files(config.input, written, config.format, config.text_unit)
    evaluation = evaluation_files(config.decontaminate)
    settings = config.model_dump(mode="json", exclude={"output", "max_bad", "execution"})
    versions = library_versions({file.kind for file in [*files, *evaluation]})
    identity = {
        "pipeline": PIPELINE_VERSION,
        "config": {key: value for key, value in settings.items() if key != "input"},  # the files are what it means
        "files": [file.identity for file in files],
        "evaluation": [file.identity for file in evaluation],
        "vocabulary": [tokenizer.vocab_sha256, tokenizer.vocab_size, tokenizer.eod_id],
        "versions": versions,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    chunk_bytes = _chunk_bytes(config.execution.chunk_mb, sum(file.size for file in files))
    return Plan(files, evaluation, cut_into_chunks(files, chunk_bytes), chunk_bytes, settings, versions, digest)


def library_versions(kinds: Set[Kind]) -> dict[str, str]:
    """Versions of all that a result depends on, the input having files of these kinds."""
    names = {*_LIBRARIES, *(name for kind in kinds for name in LIBRARIES_OF_KIND.get(kind, ()))}
    names.update(_LIBRARIES_OF_COLUMNS if kinds & {"parquet", "arrow"} else ())
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    return {"megagpt": megagpt.__version__, "unicode": unicodedata.unidata_version, **versions}


def cut_into_chunks(files: Sequence[SourceFile], chunk_bytes: int) -> list[Chunk]:
    """Chunks of about `chunk_bytes` that cover all files in order; files that cannot be split stay whole."""
    chunks, pieces, size = [], [], 0
    for index, file in enumerate(files):
        step = chunk_bytes if file.is_splittable else max(file.size, 1)
        for start in range(0, max(file.size, 1), step):  # an empty file is a piece, too: it is reported
            pieces.append(Piece(file, index, start, min(start + step, file.size)))
            size += max(pieces[-1].stop - start, _FILE_BYTES)
            if size >= chunk_bytes:
                chunks.append(Chunk(tuple(pieces)))
                pieces, size = [], 0
    if pieces:
        chunks.append(Chunk(tuple(pieces)))
    return chunks


def _chunk_bytes(chunk_mb: float | None, input_bytes: int) -> int:
    if chunk_mb is not None:
        return max(1, int(chunk_mb * (1 << 20)))
    return min(max(input_bytes // 128, _SMALLEST_CHUNK), max(_LARGEST_CHUNK, input_bytes // _MOST_CHUNKS))
