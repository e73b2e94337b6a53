"""The dataset files: byte for byte the layout, token for token what was written, and one clear error for the rest."""

import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data import indexed
from megagpt.data.indexed import IndexedDataset, IndexedDatasetWriter, merge, token_dtype
from megagpt.errors import UserError
from tests.unit.data.reference import index_bytes, read_documents, write_dataset, write_stream, writes_files

TOKENS = st.lists(st.lists(st.integers(0, 65_535), max_size=8), max_size=12)


def test_bytes_of_a_tiny_dataset_are_the_published_layout(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "tiny", [[1, 2, 300], [65_535]])
    assert Path(prefix + ".bin").read_bytes() == bytes.fromhex("0100 0200 2c01 ffff")
    assert Path(prefix + ".idx").read_bytes() == bytes.fromhex(
        "4d4d4944494458 0000"  # magic
        "0100000000000000 08"  # version 1, uint16
        "0200000000000000 0300000000000000"  # two sequences, two documents and one
        "03000000 01000000"  # lengths
        "0000000000000000 0600000000000000"  # pointers
        "0000000000000000 0100000000000000 0200000000000000"  # documents
    )


@writes_files
@given(TOKENS)
def test_written_documents_are_read_back_by_an_independent_reader(tmp_path_factory, documents) -> None:
    prefix = write_dataset(tmp_path_factory.mktemp("w") / "a", documents)
    assert read_documents(prefix) == [[document] for document in documents]


@writes_files
@given(TOKENS)
def test_reading_by_sequence_document_stream_and_position_agrees_with_what_was_written(
    tmp_path_factory, documents
) -> None:
    dataset = IndexedDataset(write_dataset(tmp_path_factory.mktemp("r") / "a", documents))
    flat = [token for document in documents for token in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (len(documents), len(documents), len(flat))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert [dataset.document(i).tolist() for i in range(len(documents))] == documents
    assert dataset.tokens(0, len(flat)).tolist() == flat
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    assert dataset.document_of(np.arange(len(flat))).tolist() == owners
    assert dataset.verify() == (min(flat, default=0), max(flat, default=0))


@writes_files
@given(TOKENS, TOKENS)
def test_merge_is_concatenation(tmp_path_factory, first, second) -> None:
    folder = tmp_path_factory.mktemp("m")
    merge([write_dataset(folder / "a", first), write_dataset(folder / "b", second)], folder / "ab")
    assert read_documents(folder / "ab") == [[document] for document in first + second]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_merge_keeps_documents_of_several_sequences_at_any_chunk_size(tmp_path: Path, monkeypatch, chunk) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(6)))
    (tmp_path / "a.idx").write_bytes(index_bytes([2, 0, 1, 3], [0, 2, 2, 3], [0, 2, 2, 4], code=1))
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "out")
    expected = [[[0, 1], []], [], [[2], [3, 4, 5]]]
    assert read_documents(tmp_path / "out") == expected * 2
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.verify() == (0, 5)
    assert [dataset.document(i).tolist() for i in range(3)] == [[0, 1], [], [2, 3, 4, 5]]


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")])
def test_every_dtype_code_of_the_layout_is_read_and_written(tmp_path: Path, code: int, dtype: str) -> None:
    values = [np.iinfo(dtype).min, 7, np.iinfo(dtype).max]
    (tmp_path / "foreign.bin").write_bytes(np.array(values, "<" + dtype).tobytes())
    width = np.dtype(dtype).itemsize
    (tmp_path / "foreign.idx").write_bytes(index_bytes([1, 2], [0, width], [0, 1, 2], code))
    dataset = IndexedDataset(tmp_path / "foreign")
    assert (dataset.dtype, dataset.tokens(0, 3).tolist()) == (np.dtype(dtype), values)
    own = write_dataset(tmp_path / "own", [values[:1], values[1:]], dtype)
    assert Path(own + ".idx").read_bytes() == (tmp_path / "foreign.idx").read_bytes()


def test_vocabularies_below_65500_take_two_bytes_a_token() -> None:
    assert [token_dtype(size) for size in (257, 65_499, 65_500, 200_019)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_many_documents_at_once_are_the_same_bytes_as_one_by_one(tmp_path: Path) -> None:
    documents = [[5, 6], [], [7]]
    one_by_one = write_dataset(tmp_path / "a", documents)
    with IndexedDatasetWriter(tmp_path / "b", "u2") as writer:
        writer.add_documents([5, 6, 7], [2, 0, 1])
        assert (writer.num_tokens, writer.num_sequences, writer.num_documents) == (3, 3, 3)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/b{suffix}").read_bytes() == Path(one_by_one + suffix).read_bytes()


@pytest.mark.parametrize("tokens", [[65_536], [-1], [[1, 2]], [0.5]])
def test_tokens_that_dtype_cannot_hold_are_refused_not_wrapped(tmp_path: Path, tokens) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "u2") as writer:
        with pytest.raises(ValueError, match="token"):
            writer.add_document(tokens)
        with pytest.raises(ValueError, match="lengths"):
            writer.add_documents([1, 2, 3], [1, 1])
    assert read_documents(tmp_path / "a") == []


def test_a_failed_write_leaves_no_file_and_the_older_dataset_as_it_was(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1], [2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="token ids 3 to 70000"), IndexedDatasetWriter(tmp_path / "a", "u2") as writer:
        writer.add_documents([3, 70_000], [1, 1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rewriting_replaces_the_dataset_while_readers_keep_the_old_one(tmp_path: Path) -> None:
    old = IndexedDataset(write_dataset(tmp_path / "a", [[1], [2]]))
    write_dataset(tmp_path / "a", [[9, 9, 9]])
    assert [old[0].tolist(), old[1].tolist()] == [[1], [2]]
    assert read_documents(tmp_path / "a") == [[[9, 9, 9]]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    program = (
        "import sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from megagpt.data.indexed import IndexedDatasetWriter\n"
        "with IndexedDatasetWriter(sys.argv[1], 'i8') as writer:\n"
        "    for _ in range(3000): writer.add_document(range(100))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a"], preexec_fn=limit_file_size, capture_output=True, text=True
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        f"megagpt.errors.UserError: {tmp_path / 'a'}: cannot be written: File too large; "
        "free space or choose another folder"
    )
    assert os.listdir(tmp_path) == []


def test_the_writer_s_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    lengths, tokens = np.ones(1 << 16, np.int32), np.zeros(1 << 16, np.uint16)
    tracemalloc.start()
    with IndexedDatasetWriter(tmp_path / "a", "u2") as writer:
        for _ in range(64):
            writer.add_documents(tokens, lengths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 4 million documents have 20 bytes an entry in the index: 84 MB. The writer works in chunks of a million.
    assert peak < 48e6
    assert len(IndexedDataset(tmp_path / "a")) == 1 << 22


def _sum_in_child(dataset: IndexedDataset, queue) -> None:
    queue.put((int(dataset.tokens(0, dataset.num_tokens).sum()), dataset.document(3).tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_dataset_reads_the_same_in_a_child_process(tmp_path: Path, method: str) -> None:
    dataset = IndexedDataset(write_stream(tmp_path / "a", 1000))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(dataset, queue))
    child.start()
    assert queue.get(timeout=60) == (sum(range(1000)), dataset.document(3).tolist())
    child.join()


def test_pickling_carries_the_prefix_not_the_tokens(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_stream(tmp_path / "a", 100_000))
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content).tokens(70, 80).tolist() == list(range(70, 80))


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """A soft limit that leaves room for eight more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_datasets_than_the_soft_limit_of_open_files_can_be_open(tmp_path: Path, few_open_files: int) -> None:
    prefixes = [write_dataset(tmp_path / str(number), [[number]]) for number in range(few_open_files)]
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    assert [dataset[0].tolist() for dataset in datasets] == [[number] for number in range(few_open_files)]


def test_too_many_open_files_is_one_clear_error(tmp_path: Path, few_open_files: int, monkeypatch) -> None:
    prefixes = [write_dataset(tmp_path / str(number), [[number]]) for number in range(5)]
    monkeypatch.setattr(indexed.resource, "getrlimit", lambda _: (few_open_files, few_open_files))
    with pytest.raises(UserError, match=r"/\d\.(bin|idx): cannot be read: Too many open files; .*raise the limit"):
        print([IndexedDataset(prefix) for prefix in prefixes])


def test_mapped_arrays_are_read_only(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_stream(tmp_path / "a", 10))
    for array in (dataset.stream, dataset.lengths, dataset.pointers, dataset.document_indices):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@writes_files
@given(st.integers(0, 10**9))
def test_document_of_agrees_with_a_search_in_the_cumulated_lengths(tmp_path_factory, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 5, 50)
    with IndexedDatasetWriter(tmp_path_factory.mktemp("d") / "a", "u2") as writer:
        writer.add_documents(np.zeros(lengths.sum(), np.uint16), lengths)
    positions = np.arange(lengths.sum())
    expected = np.searchsorted(np.cumsum(lengths), positions, side="right")
    assert (IndexedDataset(writer.prefix).document_of(positions) == expected).all()


MASKED = st.lists(st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), max_size=6), max_size=9)


def write_masked(prefix: Path, documents: list[list[tuple[int, bool]]]) -> str:
    """A dataset of documents of (token, learned); a document of learned tokens only is given without a mask."""
    with IndexedDatasetWriter(prefix, "u2", loss_mask=True) as writer:
        for document in documents:
            tokens, learned = [token for token, _ in document], [learned for _, learned in document]
            writer.add_document(tokens, None if all(learned) else learned)
    return str(prefix)


@writes_files
@given(MASKED)
def test_a_loss_mask_is_a_byte_a_token_beside_the_same_files(tmp_path_factory, documents) -> None:
    folder = tmp_path_factory.mktemp("l")
    dataset = IndexedDataset(write_masked(folder / "masked", documents))
    plain = IndexedDataset(
        write_dataset(folder / "plain", [[token for token, _ in document] for document in documents])
    )
    learned = [learned for document in documents for _, learned in document]
    assert (folder / "masked.mask").read_bytes() == bytes(learned)
    for suffix in (".bin", ".idx"):
        assert Path(f"{folder}/masked{suffix}").read_bytes() == Path(f"{folder}/plain{suffix}").read_bytes()
    assert dataset.loss_mask.tolist() == learned
    assert [dataset.document_loss_mask(number).tolist() for number in range(len(documents))] == [
        [learned for _, learned in document] for document in documents
    ]
    assert (dataset.count_learned(), plain.count_learned()) == (sum(learned), len(learned))
    assert (plain.loss_mask, os.path.exists(folder / "plain.mask")) == (None, False)


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_merge_keeps_loss_masks_and_learns_all_of_a_dataset_without(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    masked, plain = (
        write_masked(tmp_path / "a", [[(1, False), (2, True), (3, False)]]),
        write_dataset(tmp_path / "b", [[4, 5]]),
    )
    merge([plain, masked, plain], tmp_path / "out")
    assert (tmp_path / "out.mask").read_bytes() == bytes([1, 1, 0, 1, 0, 1, 1])
    assert read_documents(tmp_path / "out") == [[[4, 5]], [[1, 2, 3]], [[4, 5]]]
    with (
        pytest.raises(ValueError, match=r"a mask needs IndexedDatasetWriter\(\.\.\., loss_mask=True\)"),
        IndexedDatasetWriter(tmp_path / "lossy", "u2") as writer,
    ):
        writer.add_dataset(IndexedDataset(masked))


def test_rewriting_without_a_mask_removes_the_old_mask_and_a_failure_keeps_it(tmp_path: Path) -> None:
    write_masked(tmp_path / "a", [[(1, False), (2, True)]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for mask in ([0], [0, 2], [[0, 1]], [0.5, 1]):
        with (
            pytest.raises(ValueError, match="a mask must be 0 or 1 for each of 2 tokens, not "),
            IndexedDatasetWriter(tmp_path / "a", "u2", loss_mask=True) as writer,
        ):
            writer.add_document([1, 2], mask)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_dataset(tmp_path / "a", [[7, 8, 9]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_loss_mask_of_another_length_or_with_other_bytes_is_one_clear_error(tmp_path: Path) -> None:
    write_masked(tmp_path / "a", [[(1, False), (2, True)]])
    (tmp_path / "a.mask").write_bytes(bytes([0, 1, 1]))
    message = "a loss mask one byte for each; copy it again or make it anew"
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.mask: 3 bytes, but the dataset has 2 tokens and {message}$"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.mask").write_bytes(bytes([0, 49]))
    with pytest.raises(UserError, match=r"a\.mask: byte 1 is 49, but a loss mask has 0 and 1 only; make it anew$"):
        IndexedDataset(tmp_path / "a").count_learned()
    (tmp_path / "a.mask").unlink()
    (tmp_path / "a.mask").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"a\.mask: no such file"):
        IndexedDataset(tmp_path / "a")


def test_the_edge_hash_tells_masks_apart_and_a_mask_from_none(tmp_path: Path) -> None:
    tokens = np.zeros(200_000, np.uint16)
    hashes = set()
    for number, changed in enumerate([None, [], [0], [199_999]]):
        mask = np.ones(tokens.size, np.uint8)
        mask[changed] = 0
        with IndexedDatasetWriter(tmp_path / str(number), "u2", loss_mask=changed is not None) as writer:
            writer.add_document(tokens, None if changed is None else mask)
        hashes.add(IndexedDataset(writer.prefix).edge_hash())
    assert len(hashes) == 4


GOOD = index_bytes([2, 1], [0, 4], [0, 1, 2])


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"", "a.idx: not a token index, it does not begin with MMIDIDX"),
        (b"PK\x03\x04" + bytes(60), "a.idx: not a token index, it does not begin with MMIDIDX"),
        (GOOD[:20], "a.idx: truncated: 20 bytes, its header alone takes 34; copy it again"),
        (GOOD[:-1], "a.idx: truncated: 81 bytes, but 2 sequences and 2 documents take 82; copy it again"),
        (GOOD + b"\0", "a.idx: too long: 83 bytes, but 2 sequences and 2 documents take 82; copy it again"),
        (index_bytes([2, 1], [0, 4], [0, 2], version=2), "a.idx: layout version 2 is not supported, only 1 is"),
        (
            index_bytes([2, 1], [0, 4], [0, 2], code=6),
            "a.idx: unknown dtype code 6, known are 1 uint8, 2 int8, 3 int16",
        ),
        (index_bytes([2, 1], [0, 4], []), "a.idx: the document index has no entries"),
        (index_bytes([2, 1], [0, 4], [0, 3]), "a.idx: its documents span sequences 0 to 3 instead of 0 to 2"),
        (index_bytes([2, 1], [0, 4], [1, 2]), "a.idx: its documents span sequences 1 to 2 instead of 0 to 2"),
        (index_bytes([2, 1], [2, 4], [0, 2]), "a.idx: the first sequence begins at byte 2 instead of 0"),
        (index_bytes([2, 2], [0, 4], [0, 2]), "a.bin: 6 bytes, but its index describes 8; copy both files again"),
        (index_bytes([], [], [0]), "a.bin: 6 bytes, but its index describes 0; copy both files again"),
        (index_bytes([2, 1], [0, 2], [0, 2], code=4), "a.idx: 6 bytes of tokens do not divide into int32 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "idx",
)
def test_a_damaged_index_is_one_clear_error_at_open(tmp_path: Path, idx: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(idx)
    (tmp_path / "a.bin").write_bytes(bytes(6))
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_a_truncated_or_missing_file_is_one_clear_error_at_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx: no such file; a dataset is named by its prefix: data/train"):
        IndexedDataset(tmp_path / "a")
    write_dataset(tmp_path / "a", [[1, 2, 3]])
    os.truncate(tmp_path / "a.bin", 4)
    with pytest.raises(UserError, match=r"a\.bin: 4 bytes, but its index describes 6; copy both files again"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin: no such file"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match=r"a\.bin: cannot be read: Is a directory"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (
            index_bytes([1, 2, 1], [0, 4, 6], [0, 1, 2, 3]),
            "a.idx: sequence 1: 2 tokens at byte 4, but the sequences before it end at byte 2; write it anew",
        ),
        (
            index_bytes([1, -2, 5], [0, 2, -2], [0, 1, 2, 3]),
            "a.idx: sequence 1: -2 tokens at byte 2, but the sequences before it end at byte 2; write it anew",
        ),
        (
            index_bytes([1, 2, 1], [0, 2, 6], [0, 2, 1, 3]),
            "a.idx: document 2 begins at sequence 1, before document 1 at 2; write it anew",
        ),
    ],
)
def test_verify_names_the_first_wrong_entry(tmp_path: Path, monkeypatch, idx: bytes, message: str, chunk: int) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    (tmp_path / "a.idx").write_bytes(idx)
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "a").verify()
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_merge_refuses_unequal_dtypes_and_nothing(tmp_path: Path) -> None:
    prefixes = [write_dataset(tmp_path / "a", [[1]], "u2"), write_dataset(tmp_path / "b", [[1]], "i4")]
    with pytest.raises(UserError, match=r"b\.bin: holds int32, but .*out\.bin is written in uint16; merge datasets of"):
        merge(prefixes, tmp_path / "out")
    with pytest.raises(UserError, match="out: no datasets to merge; name at least one prefix"):
        merge([], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]
