"""How the input is cut into chunks."""

import pyarrow as pa

from megagpt.corpus.plan import cut_into_chunks, library_versions
from megagpt.corpus.sources import SourceFile


def test_many_small_files_are_work_for_several_workers() -> None:
    files = [SourceFile(f"{number:05d}.txt", 10, 0, found_in_folder=True) for number in range(10_000)]
    chunks = cut_into_chunks(files, 1 << 22)
    assert len(chunks) == 10
    assert [piece.file for chunk in chunks for piece in chunk.pieces] == files


def test_the_versions_of_what_reads_the_input_are_part_of_the_plan() -> None:
    assert "pyarrow" not in library_versions({"jsonl", "text"})
    assert library_versions({"parquet"})["pyarrow"] == library_versions({"arrow"})["pyarrow"] == pa.__version__
    assert "resiliparse" in library_versions({"html"})
