"""Exact duplicates, against a dictionary."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus import exact, external
from megagpt.corpus.documents import Documents, Part
from megagpt.corpus.exact import PAIR, ExactTask, KeyRange
from megagpt.corpus.external import written_runs
from megagpt.corpus.extract import HASHED
from megagpt.corpus.workspace import write_array

HALF = st.sampled_from([0, 1, 2**62, 2**63, 2**64 - 1])


@given(st.lists(st.lists(st.tuples(HALF, HALF), max_size=30), min_size=1, max_size=5), st.integers(1, 4), st.booleans())
def test_every_repeat_is_paired_with_the_first_and_half_equal_hashes_differ(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[tuple[int, int]]], ranges: int, little_memory: bool
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    documents: list[Part] = []
    for number, hashes in enumerate(parts):
        first = documents[-1].stop if documents else 0
        documents.append(Part(folder / str(number), 0, number, first, len(hashes)))
        documents[-1].folder.mkdir()
        records = np.array(sorted((high, low, row) for row, (high, low) in enumerate(hashes)), HASHED)
        write_array(documents[-1].folder / "hashes.bin", records)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if little_memory:
            patch.setattr(external.merge_runs, "__defaults__", (False, 1))
        for keys in (KeyRange(index, ranges) for index in range(ranges)):
            target = folder / f"range_{keys.index}"
            target.mkdir()
            receipt = ExactTask(Documents(tuple(documents)), keys).run(target)
            pairs = [pair for run in written_runs(target, "pairs", PAIR) for pair in run.read(0, len(run)).tolist()]
            assert receipt["duplicates"] == len(pairs)
            found += pairs
    texts = list(itertools.chain.from_iterable(parts))
    assert sorted(found) == [(n, texts.index(text)) for n, text in enumerate(texts) if texts.index(text) != n]


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_ranges_of_keys_tile_all_keys(documents: int, documents_a_task: int) -> None:
    ranges = KeyRange.split(min(documents, 1000 * documents_a_task), documents_a_task)
    assert (ranges[0].low, ranges[-1].high) == (0, None)
    assert all(left.high == right.low for left, right in itertools.pairwise(ranges))
    assert exact.KeyRange.split(0)[0].high is None
