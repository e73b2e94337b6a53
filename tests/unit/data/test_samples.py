"""Samples: they tile the stream, each comes once an epoch, every validation target comes once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.indexed import IndexedDataset
from megagpt.data.samples import IGNORE_INDEX, SequentialSamples, TokenSamples
from megagpt.errors import UserError
from tests.unit.data.reference import read_documents, write_dataset, write_stream, writes_files


@writes_files
@given(st.integers(2, 300), st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_tiles_the_stream_with_each_sample_once(tmp_path_factory, tokens, seq_len, seed, epoch) -> None:
    tokens = max(tokens, seq_len + 1)
    samples = TokenSamples(IndexedDataset(write_stream(tmp_path_factory.mktemp("s") / "a", tokens)), seq_len, seed)
    read = samples.read(np.arange(len(samples)) + epoch * len(samples)).tokens
    in_file_order = read[np.argsort(read[:, 0])]
    # The token at position p is p: what was read says where it stood.
    offset = in_file_order[0, 0]
    assert 0 <= offset < seq_len
    expected = [np.arange(offset + k * seq_len, offset + (k + 1) * seq_len + 1) for k in range(len(samples))]
    assert np.array_equal(in_file_order, expected)
    assert read.max() < tokens
    # No more than one whole sample is lost to the offset.
    assert len(samples) >= max(1, (tokens - 1) // seq_len - 1)


def test_each_epoch_has_its_own_offset_and_order_and_each_seed_too(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_stream(tmp_path / "a", 1000))
    samples = TokenSamples(dataset, 16, seed=1)
    starts = samples.starts(np.arange(4 * len(samples))).reshape(4, -1)
    assert len(set((starts % 16)[:, 0].tolist())) > 1
    assert all((first != second).any() for first, second in zip(starts // 16, starts[1:] // 16, strict=False))
    assert (TokenSamples(dataset, 16, seed=2).starts(np.arange(len(samples))) != starts[0]).any()
    # 0 to 15 are all drawn, at equal rates, over many epochs.
    offsets = samples.starts(np.arange(2000) * len(samples)) % 16
    assert np.bincount(offsets, minlength=16).min() > 80


def test_a_sample_is_the_same_whatever_it_is_read_with(tmp_path: Path) -> None:
    samples = TokenSamples(IndexedDataset(write_stream(tmp_path / "a", 500)), 8, seed=3)
    indices = [0, 700, 3, len(samples) - 1, len(samples), 3]
    together = samples.read(indices, document_ids=True)
    for row, index in enumerate(indices):
        alone = samples.read([index], document_ids=True)
        assert np.array_equal(together.tokens[row], alone.tokens[0])
        assert np.array_equal(together.document_ids[row], alone.document_ids[0])
    assert (together.tokens.dtype, together.document_ids.dtype) == (np.uint16, np.int32)
    assert samples.read([0])[1:] == (None, None)


@pytest.mark.parametrize("view", [TokenSamples, SequentialSamples])
@writes_files
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=12).filter(lambda d: sum(map(len, d)) > 7)
)
def test_document_ids_separate_exactly_the_documents(tmp_path_factory, view, documents) -> None:
    """Against a list of owners: two inputs have equal ids if and only if they come from the same document."""
    prefix = write_dataset(tmp_path_factory.mktemp("s") / "a", documents)
    owners = [number for number, (document,) in enumerate(read_documents(prefix)) for _ in document]
    dataset = IndexedDataset(prefix)
    samples = TokenSamples(dataset, 6, 0) if view is TokenSamples else SequentialSamples(dataset, 6)
    indices = np.arange(2 * len(samples) if view is TokenSamples else len(samples))
    starts = samples.starts(indices) if view is TokenSamples else indices * 6
    for start, ids in zip(starts, samples.read(indices, document_ids=True).document_ids, strict=True):
        own = np.array(owners[start : start + 6])
        ids = ids[: own.size]
        assert ids[0] == 0
        assert np.array_equal(ids[:, None] == ids[None], own[:, None] == own[None])
        assert np.array_equal(ids, own - own[0])


@pytest.mark.parametrize("view", [TokenSamples, SequentialSamples])
@writes_files
@given(st.lists(st.integers(0, 1), min_size=7, max_size=120), st.integers(0, 2**32))
def test_the_loss_mask_of_a_sample_is_that_of_its_targets(tmp_path_factory, view, mask, seed) -> None:
    """The token at position p is p, so each target says which byte of the mask is its own."""
    mask = np.array(mask)
    dataset = IndexedDataset(write_stream(tmp_path_factory.mktemp("s") / "a", mask.size, mask=mask))
    samples = TokenSamples(dataset, 6, seed) if view is TokenSamples else SequentialSamples(dataset, 6)
    windows = samples.read(np.arange(2 * len(samples)))
    targets = windows.tokens[:, 1:]
    real = targets != IGNORE_INDEX
    assert (windows.learned.shape, windows.learned.dtype) == (targets.shape, bool)
    assert np.array_equal(windows.learned[real], mask[targets[real]] == 1)
    assert real.any()


def test_one_sample_fits_a_dataset_of_its_size_and_one_token_less_is_an_error(tmp_path: Path) -> None:
    samples = TokenSamples(IndexedDataset(write_stream(tmp_path / "a", 9)), 8, seed=0)
    assert np.array_equal(samples.read([0, 1, 99]).tokens, [range(9)] * 3)
    with pytest.raises(UserError) as caught:
        TokenSamples(samples.dataset, 9, seed=0)
    assert str(caught.value) == (
        f"{tmp_path / 'a'}.bin: one sample of seq_len 9 needs 10 tokens, but there are 9; "
        "add text or choose a smaller seq_len"
    )


@writes_files
@given(st.integers(2, 60), st.integers(1, 13))
def test_validation_has_every_target_once_after_its_own_input(tmp_path_factory, tokens: int, seq_len: int) -> None:
    samples = SequentialSamples(IndexedDataset(write_stream(tmp_path_factory.mktemp("s") / "a", tokens)), seq_len)
    read = samples.read(np.arange(len(samples) + 3)).tokens
    targets, inputs = read[:, 1:], read[:, :-1]
    real = targets != IGNORE_INDEX
    assert targets[real].tolist() == list(range(1, tokens))
    assert np.array_equal(inputs[real] + 1, targets[real])
    assert (read[len(samples) :] == IGNORE_INDEX).all()
    assert real[len(samples) - 1].any()
    assert samples.num_targets == tokens - 1


@pytest.mark.parametrize("tokens", [0, 1])
def test_validation_needs_two_tokens(tmp_path: Path, tokens: int) -> None:
    prefix = write_dataset(tmp_path / "a", [[1] * tokens])
    with pytest.raises(
        UserError, match=rf"a\.bin: a validation dataset needs at least 2 tokens, but there are {tokens}"
    ):
        SequentialSamples(IndexedDataset(prefix), 4)
