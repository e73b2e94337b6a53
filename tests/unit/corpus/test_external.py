"""Merging sorted runs: the same as sorting everything in memory, whatever the buffers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus.external import Run, RunWriter, merge_runs, without_repeats, written_runs
from megagpt.corpus.workspace import write_array

NUMBERED = np.dtype([("key", "<u8"), ("number", "<u4")])
PLAIN = np.dtype([("a", "<u8"), ("b", "<u8")])
KEYS = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), max_size=60), min_size=1, max_size=6)


def write_numbered(folder: Path, parts: list[list[int]]) -> list[Run]:
    runs, first = [], 0
    for index, keys in enumerate(parts):
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        records = np.zeros(len(keys), NUMBERED)
        records["key"], records["number"] = np.array(keys, np.uint64)[order], order
        write_array(folder / str(index), records)
        runs.append(Run.of(folder / str(index), NUMBERED, first))
        first += len(keys)
    return runs


@given(KEYS, st.sampled_from([1, 16 * 12 * 6, 1 << 20]))
def test_numbered_runs_come_out_sorted_by_key_and_number(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], memory_bytes: int
) -> None:
    runs = write_numbered(tmp_path_factory.mktemp("runs"), parts)
    blocks = list(merge_runs(runs, ("key", "number"), numbered=True, memory_bytes=memory_bytes))
    expected = sorted((key, number) for number, key in enumerate(key for part in parts for key in part))
    assert [record for block in blocks for record in block.tolist()] == expected
    if memory_bytes == 1:
        assert all(block.size <= 2 * 16 * len(runs) for block in blocks)


@given(KEYS, st.integers(0, 4), st.one_of(st.none(), st.integers(0, 4)))
def test_a_range_of_keys_is_found_in_a_run(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], low: int, high: int | None
) -> None:
    runs = write_numbered(tmp_path_factory.mktemp("runs"), parts)
    for run, keys in zip(runs, parts, strict=True):
        inside = run.between("key", low, high)
        found = inside.read(0, len(inside))["key"].tolist()
        assert found == sorted(key for key in keys if low <= key and (high is None or key < high))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=80), st.integers(1, 20), st.integers(1, 20))
def test_what_is_written_in_runs_comes_out_sorted_and_without_the_repeats_of_a_run(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], run_records: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    with RunWriter(folder, "pairs", PLAIN, run_records) as writer:
        for start in range(0, len(pairs), step):
            writer.add(np.array(pairs[start : start + step], PLAIN))
    runs = written_runs(folder, "pairs", PLAIN)
    assert all(len(run) <= run_records + step for run in runs)
    merged = [record for block in merge_runs(runs, ("a", "b")) for record in block.tolist()]
    assert merged == sorted(merged)
    last, unique = None, []
    for block in merge_runs(runs, ("a", "b"), memory_bytes=1):
        unique += without_repeats(block, last).tolist()
        last = block[-1:]
    assert unique == sorted(set(pairs))


def test_nothing_is_written_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with RunWriter(tmp_path, "pairs", PLAIN) as writer:
            writer.add(np.zeros(3, PLAIN))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    write_array(tmp_path / "run", np.zeros(10, PLAIN))
    run = Run.of(tmp_path / "run", PLAIN)
    with open(tmp_path / "run", "r+b") as file:
        file.truncate(50)
    with pytest.raises(OSError, match="ends before record 10"):
        list(merge_runs([run], ("a", "b")))
