"""Where the documents of a token dataset came from: `prefix.ids`, and the sources that the dataset's folder lists.

prefix.ids holds an ORIGIN for every document, in the order of the dataset: its id, which is "file index:position". The
index is a line of sources.jsonl, the position a byte offset in the file or, of a columnar one, a row.
"""

from pathlib import Path

import numpy as np

ORIGIN = np.dtype([("file", "<u4"), ("position", "<u8")])
SOURCES_NAME = "sources.jsonl"


def ids_path(prefix: str | Path) -> Path:
    """The file of ids of a dataset."""
    return Path(f"{prefix}.ids")
