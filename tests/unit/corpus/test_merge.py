"""The external merge: the same dataset as sorting all documents in memory, in blocks of any size."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.corpus.merge import write_split
from megagpt.corpus.tokenize import TOKENIZED
from megagpt.corpus.workspace import write_array
from megagpt.data.indexed import IndexedDataset


@pytest.mark.parametrize("block_tokens", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_documents_of_a_split_come_out_sorted_by_key_whatever_the_block(
    tmp_path: Path, block_tokens: int, dtype: str
) -> None:
    rng = np.random.default_rng(block_tokens)
    chunks: list[Path] = []
    expected: dict[int, list[tuple[int, list[int]]]] = {0: [], 1: []}
    for number in range(5):
        count = int(rng.integers(0, 12)) if number != 2 else 0
        splits, keys = rng.integers(0, 2, count), rng.integers(0, 30, count).astype(np.uint64)
        order = np.lexsort((keys, splits))
        documents = [rng.integers(0, 60_000, rng.integers(1, 9)).astype(dtype) for _ in range(count)]
        index = np.zeros(count, TOKENIZED)
        index["split"], index["key"], index["tokens"] = splits[order], keys[order], [documents[i].size for i in order]
        chunks.append(tmp_path / f"{number}")
        chunks[-1].mkdir()
        write_array(chunks[-1] / "index.bin", index)
        write_array(chunks[-1] / "tokens.bin", np.concatenate([np.empty(0, dtype), *(documents[i] for i in order)]))
        for i in order:
            expected[int(splits[i])].append((int(keys[i]), documents[i].tolist()))
    for split, pairs in expected.items():
        info = write_split(tmp_path / f"out{split}", split, chunks, np.dtype(dtype), block_tokens)
        dataset = IndexedDataset(tmp_path / f"out{split}")
        in_order = [tokens for _, tokens in sorted(pairs, key=lambda pair: pair[0])]  # stable: ties by chunk
        assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == in_order
        assert info is not None
        assert (info.documents, info.tokens) == (len(in_order), sum(map(len, in_order)))


def test_a_split_without_documents_is_not_written(tmp_path: Path) -> None:
    write_array(tmp_path / "index.bin", np.zeros(0, TOKENIZED))
    write_array(tmp_path / "tokens.bin", np.zeros(0, "<u2"))
    assert write_split(tmp_path / "out", 0, [tmp_path], np.dtype("<u2")) is None
    assert not list(tmp_path.glob("out*"))
