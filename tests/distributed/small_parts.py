"""The command tools.preprocess with parts, key ranges, runs and buffers so small that a small corpus has many of each.

Run it as `python -m tests.distributed.small_parts`; its workers import it, too, and so see the same sizes.
"""

from megagpt.corpus import external, extract, near, select, write
from megagpt.corpus.exact import KeyRange
from tools.command import run_command
from tools.preprocess import NAME, app

DOCUMENTS_A_RANGE = 90
_split = KeyRange.split


def shrink() -> None:
    """Make them small in this process; the bytes that come out must not depend on it."""
    extract.PART_DOCUMENTS, extract.PART_BYTES = 40, 60_000
    write._TASK_TOKENS = 20_000
    near._MEMBER_BLOCK, near._ROW_BLOCK, select._SURVIVOR_BLOCK = 16, 8, 4
    external.merge_runs.__defaults__ = (False, 2000)
    external.RunWriter.__init__.__defaults__ = (4,)
    KeyRange.split = classmethod(lambda cls, documents: _split(documents, DOCUMENTS_A_RANGE))  # type: ignore[assignment]


shrink()

if __name__ == "__main__":
    run_command(app, NAME)
