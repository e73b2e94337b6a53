"""How the input is cut into chunks."""

from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.sources import SourceFile


def test_many_small_files_are_work_for_several_workers() -> None:
    files = [SourceFile(f"{number:05d}.txt", 10, 0, found_in_folder=True) for number in range(10_000)]
    chunks = cut_into_chunks(files, 1 << 22)
    assert len(chunks) == 10
    assert [piece.file for chunk in chunks for piece in chunk.pieces] == files
