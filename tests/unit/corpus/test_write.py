"""The external sort: the same dataset as sorting all documents in memory, in any number of tasks."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.corpus import write
from megagpt.corpus.documents import Documents, Part
from megagpt.corpus.tokenize import TOKENIZED, shuffle_keys
from megagpt.corpus.workspace import Receipt, task_folder, write_array
from megagpt.corpus.write import join, write_tasks
from megagpt.data.indexed import IndexedDataset
from megagpt.data.origins import ORIGIN, ids_path


@pytest.mark.parametrize("task_tokens", [1, 20, 1 << 20])
@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("shuffled", [True, False])
def test_documents_of_a_split_come_out_sorted_by_key_in_any_number_of_tasks(
    tmp_path: Path, task_tokens: int, dtype: str, shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_TASK_TOKENS", task_tokens)
    monkeypatch.setattr(write, "_TOKENS_OF_A_DOCUMENT", 0)
    monkeypatch.setattr(write, "_DOCUMENTS_AT_ONCE", 5)
    rng = np.random.default_rng(task_tokens)
    parts: list[Part] = []
    receipts: list[Receipt] = []
    expected: list[tuple[int, list[int], tuple[int, int]]] = []
    for number in range(5):
        count = 0 if number == 2 else int(rng.integers(1, 12))
        parts.append(Part(tmp_path, 0, number, parts[-1].stop if parts else 0, count))
        keys = rng.integers(0, 2**64, count, np.uint64) if shuffled else parts[-1].first + np.arange(count)
        keys = np.sort(keys.astype(np.uint64))
        texts = [rng.integers(0, 60_000, rng.integers(1, 9)).astype(dtype) for _ in range(count)]
        index = np.zeros(count, TOKENIZED)
        index["key"], index["tokens"] = keys, [text.size for text in texts]
        index["begin"] = np.cumsum(index["tokens"]) - index["tokens"]
        index["file"], index["position"] = number, rng.integers(0, 1000, count)
        folder = task_folder(tmp_path / "tokenize", number)
        folder.mkdir(parents=True)
        receipts.append({})
        if count:
            write_array(folder / "index_1.bin", index)
            write_array(folder / "tokens_1.bin", np.concatenate(texts))
            receipts[-1] = {"documents 1": count, "tokens 1": sum(text.size for text in texts)}
        ids = zip(index["file"].tolist(), index["position"].tolist(), strict=True)
        expected += zip(keys.tolist(), [text.tolist() for text in texts], ids, strict=True)
    expected.sort(key=lambda item: item[0])
    tasks = write_tasks(Documents(tuple(parts)), tmp_path / "tokenize", 1, receipts, shuffled, dtype)
    assert task_tokens > 100 or len(tasks) > 1
    results = []
    for number, task in enumerate(tasks):
        results.append(tmp_path / f"result_{number}")
        results[-1].mkdir()
        task.run(results[-1])
    info = join(tmp_path / "out", results, dtype)
    dataset = IndexedDataset(tmp_path / "out")
    assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == [item[1] for item in expected]
    assert np.fromfile(ids_path(tmp_path / "out"), ORIGIN).tolist() == [item[2] for item in expected]
    assert (info.documents, info.tokens) == (len(expected), sum(len(item[1]) for item in expected))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_no_document_has_a_place_of_its_own(seed: int) -> None:
    files = np.repeat(np.arange(20, dtype=np.uint32), 50)
    positions = np.tile(np.arange(50, dtype=np.uint64), 20)
    ranks = np.argsort(np.argsort(shuffle_keys(files, positions, seed)))
    assert 10 < ranks[0] < 990


def test_many_short_documents_make_more_tasks() -> None:
    documents = Documents((Part(Path(), 0, 0, 0, 10**9),))
    for tokens, tasks in ((3, 1043), (3000, 89_407)):
        receipt: Receipt = {"documents 0": 10**9, "tokens 0": tokens * 10**9}
        assert len(write_tasks(documents, Path(), 0, [receipt], True, "<u2")) == pytest.approx(tasks, rel=0.02)
    assert write_tasks(documents, Path(), 1, [receipt], True, "<u2") == []


def test_another_seed_gives_another_order() -> None:
    positions = np.arange(1000, dtype=np.uint64)
    files = np.zeros(1000, np.uint32)
    orders = [np.argsort(shuffle_keys(files, positions, seed)).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_shuffle_keys_are_distinct_and_without_visible_order() -> None:
    files = np.repeat(np.arange(50, dtype=np.uint32), 400)
    positions = np.tile(np.arange(400, dtype=np.uint64) * 1000, 50)
    keys = shuffle_keys(files, positions, seed=0)
    assert np.unique(keys).size == keys.size
    ranks = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ranks, np.arange(keys.size))[0, 1]) < 0.05
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 0.05
