"""An independent reader of the MMIDIDX layout, and small datasets on disk for the tests."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import settings

from megagpt.data.indexed import IndexedDatasetWriter

writes_files = settings(deadline=None, max_examples=50)
"""For properties of which each example writes to the disk."""

FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def read_documents(prefix: str | Path) -> list[list[list[int]]]:
    """Documents of sequences of tokens, by struct alone."""
    index, content = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    position = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from(f"<{sequences}i", index, position)
    position += 4 * sequences
    pointers = struct.unpack_from(f"<{sequences}q", index, position)
    position += 8 * sequences
    documents = struct.unpack_from(f"<{boundaries}q", index, position)
    assert position + 8 * boundaries == len(index)
    tokens = [
        list(struct.unpack_from(f"<{length}{FORMATS[code]}", content, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * struct.calcsize(FORMATS[code]) == len(content)
    return [tokens[first:last] for first, last in pairwise(documents)]


def index_bytes(
    lengths: list[int], pointers: list[int], documents: list[int], code: int = 8, version: int = 1
) -> bytes:
    """An .idx file with any content."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)
    )


def write_dataset(prefix: str | Path, documents: list[list[int]], dtype: str = "u2") -> str:
    """A dataset of these documents, as the product writes it."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def write_stream(
    prefix: str | Path, tokens: int, seed: int = 0, longest: int = 9, mask: np.ndarray | None = None
) -> str:
    """A dataset whose token at position p is p % 50,000, in documents of 1 to `longest` tokens, with a loss mask."""
    boundaries = np.cumsum(np.random.default_rng(seed).integers(1, longest + 1, tokens))
    boundaries = np.append(boundaries[boundaries < tokens], tokens)
    with IndexedDatasetWriter(prefix, "u2", loss_mask=mask is not None) as writer:
        writer.add_documents(np.arange(tokens) % 50_000, np.diff(boundaries, prepend=0), mask)
    return str(prefix)
