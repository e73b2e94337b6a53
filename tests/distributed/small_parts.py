"""The command tools.preprocess with parts, key ranges, runs and buffers so small that a small corpus has many of each.

Run it as `python -m tests.distributed.small_parts`; its workers import it, too, and so see the same sizes, of which
the environment variable DOCUMENTS_A_PART is the measure.
"""

import os

from megagpt.corpus import external, extract, near, select, write
from megagpt.corpus.exact import KeyRange
from tools.command import run_command
from tools.preprocess import NAME, app

_split = KeyRange.split


def shrink(documents: int) -> None:
    """Make a part of so many documents, and all else as small, in this process; no byte that comes out may differ."""
    extract.PART_DOCUMENTS, extract.PART_BYTES = documents, 1500 * documents
    write._TASK_TOKENS = 500 * documents
    near._MEMBER_BLOCK, near._ROW_BLOCK, select._SURVIVOR_BLOCK = documents // 3, documents // 5, documents // 10
    external.merge_runs.__defaults__ = (False, 50 * documents)
    external.RunWriter.__init__.__defaults__ = (documents // 10,)
    KeyRange.split = classmethod(lambda cls, count: _split(count, 2 * documents))  # type: ignore[assignment]


shrink(int(os.environ.get("DOCUMENTS_A_PART", 40)))

if __name__ == "__main__":
    run_command(app, NAME)
