"""Batches: the same samples for any number of ranks, micro-batches and resumes; errors surface and nothing hangs."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import BatchSizes
from megagpt.config.schema import DataSource
from megagpt.data.indexed import IndexedDataset, IndexedDatasetWriter, mask_path
from megagpt.data.loader import Batch, BatchLoader, TrainingData, ValidationData, step_windows
from megagpt.data.samples import IGNORE_INDEX, TokenSamples
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import load_tokenizer, token_byte_lengths
from tests.unit.data.reference import write_dataset, write_stream, writes_files

SEQ_LEN = 8


def source(path: Path, tokens: int, weight: float = 1.0) -> DataSource:
    return DataSource(path=write_stream(path, tokens), weight=weight)


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    """A blend of two datasets with 121 and 34 samples an epoch."""
    sources = [source(tmp_path / "a", 980, 0.7), source(tmp_path / "b", 280, 0.3)]
    return TrainingData(sources, SEQ_LEN, seed=5, document_mask=True)


def load(data, *, world_size=1, micro_batch_size=2, start=0, stop=48, global_batch_size=12) -> list[list[list[Batch]]]:
    """All steps of all ranks: [rank][step][micro-batch]."""
    ranks = []
    for rank in range(world_size):
        windows = step_windows(BatchSizes(global_batch_size), start, (stop - start) // global_batch_size)
        with BatchLoader(data, windows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size) as loader:
            steps = list(loader)
            assert [step.window.start for step in steps] == list(range(start, stop, global_batch_size))
            ranks.append([step.micro_batches for step in steps])
    return ranks


def stack(batches: list[Batch]) -> np.ndarray:
    """Inputs, targets and document ids of consecutive batches: (samples, 3, seq)."""
    parts = [torch.stack([b.input_ids, b.targets, b.document_ids.long()], dim=1) for b in batches]
    return torch.cat(parts).numpy()


def test_a_batch_holds_the_samples_that_weights_seed_and_permutation_say(tmp_path: Path, data: TrainingData) -> None:
    """Against samples drawn one by one: 7 of 10 from the first dataset, each dataset's own in its own order."""
    batch = data.read(3, 40)
    singles = [TokenSamples(IndexedDataset(tmp_path / name), SEQ_LEN, seed=5) for name in "ab"]
    drawn = [0, 0]
    for sample in range(43):
        dataset = int(data.blend.lookup([sample])[0][0])
        tokens, ids, _ = singles[dataset].read([drawn[dataset]], document_ids=True)
        drawn[dataset] += 1
        if sample >= 3:
            assert batch.input_ids[sample - 3].tolist() == tokens[0, :-1].tolist()
            assert batch.targets[sample - 3].tolist() == tokens[0, 1:].tolist()
            assert batch.document_ids[sample - 3].tolist() == ids[0].tolist()
    assert [drawn[0] / 43, drawn[1] / 43] == pytest.approx([0.7, 0.3], abs=1 / 43)
    types = [batch.input_ids.dtype, batch.targets.dtype, batch.document_ids.dtype]
    assert types == [torch.int64, torch.int64, torch.int32]
    assert batch.input_ids.is_contiguous()
    assert batch.targets.is_contiguous()


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)])
def test_ranks_and_micro_batches_only_divide_the_global_window(data, world_size: int, micro_batch_size: int) -> None:
    ranks = load(data, world_size=world_size, micro_batch_size=micro_batch_size)
    for step in range(4):
        expected = stack([data.read(12 * step, 12)])
        micro_batches = [batch for rank in ranks for batch in rank[step]]
        assert {len(batch) for batch in micro_batches} == {micro_batch_size}
        assert np.array_equal(stack(micro_batches), expected)
    assert {len(rank) for rank in ranks} == {4}


@pytest.mark.parametrize("start", [12, 36, 5])
def test_a_resume_at_any_sample_continues_as_if_never_stopped(data: TrainingData, start: int) -> None:
    (steps,) = load(data, start=start, stop=start + 24)
    assert np.array_equal(stack([b for step in steps for b in step]), stack([data.read(start, 24)]))


def test_an_epoch_of_every_dataset_reads_each_of_its_samples_once(tmp_path: Path) -> None:
    data = TrainingData([source(tmp_path / "a", 980)], SEQ_LEN, seed=0, document_mask=False)
    firsts = [data.read(epoch * 121, 121).input_ids[:, 0].numpy() for epoch in range(3)]
    for first in firsts:
        assert np.array_equal(np.sort(first) // SEQ_LEN, np.arange(121))
    assert list(data.epochs(121).values()) == [1.0]
    assert data.read(0, 1).document_ids is None


def test_epochs_count_each_dataset_by_its_own_size(data: TrainingData) -> None:
    assert list(data.epochs(1000).values()) == [700 / 121, 300 / 34]


def test_a_dataset_in_two_places_of_a_blend_is_refused(tmp_path: Path) -> None:
    """Each of its samples would come twice, soon after one another."""
    copies = [source(tmp_path / name, 100) for name in ("a", "b")]
    with pytest.raises(
        UsageError, match=r"^data\.train: \S+/a and \S+/b are the same dataset; give it once, with the su"
    ):
        TrainingData(copies, SEQ_LEN, 0, False)
    masked, _ = masked_source(tmp_path / "c", 100, seed=0)
    TrainingData([copies[0], masked], SEQ_LEN, 0, False)


def test_a_token_beyond_the_vocabulary_is_named_before_it_reaches_the_model(tmp_path: Path) -> None:
    foreign = DataSource(path=write_dataset(tmp_path / "a", [[1] * 20, [300] * 20]))
    message = rf"^{tmp_path}/a\.bin: holds token id 300, but the model knows 300 ids; raise model\.vocab_size or choose"
    training = TrainingData([foreign], SEQ_LEN, 0, False, vocab_size=300)
    with pytest.raises(UserError, match=message):
        training.read(0, 4)
    TrainingData([foreign], SEQ_LEN, 0, False, vocab_size=301).read(0, 4)
    with pytest.raises(UserError, match=message):
        list(
            ValidationData(foreign, SEQ_LEN, False, 300, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1)
        )


def test_a_global_batch_that_does_not_divide_is_a_usage_error(data: TrainingData) -> None:
    with pytest.raises(UsageError) as caught:
        load(data, world_size=5)
    assert str(caught.value) == (
        "train.global_batch_size: 12 is not a multiple of 5 ranks x train.micro_batch_size 2; change one of them"
    )


def test_windows_of_a_ramp_up_follow_each_other_and_leave_out_what_is_skipped() -> None:
    batches = BatchSizes(final=4, start=2, increment=1, samples=10)
    assert list(step_windows(batches, 0, 5)) == [(0, 2), (2, 2), (4, 2), (6, 3), (9, 3)]
    assert list(step_windows(batches, 9, 2)) == [(9, 3), (12, 4)]
    assert list(step_windows(batches, 0, 4, [(2, 4), (7, 9), (4, 6)])) == [(0, 2), (6, 3), (9, 3), (12, 4)]
    assert list(step_windows(batches, 0, 0)) == []


class Recorder:
    """A SampleReader that remembers what was asked, waits for `gate` and fails at sample `bad`."""

    def __init__(self, bad: int | None = None, open_gate: bool = True) -> None:
        self.bad, self.asked, self.gate = bad, [], threading.Event()
        if open_gate:
            self.gate.set()

    def read(self, start: int, count: int) -> Batch:
        self.asked.append(start)
        assert self.gate.wait(30)
        if self.bad is not None and start <= self.bad < start + count:
            raise UserError(f"disk gone at {start}")
        return Batch(torch.full((count, 1), start), torch.full((count, 1), start))


def open_loader(data: Recorder, prefetch: int = 2) -> BatchLoader:
    windows = step_windows(BatchSizes(4), 0, 1000)
    return BatchLoader(data, windows, micro_batch_size=2, rank=1, world_size=2, prefetch=prefetch)


def test_an_error_of_the_reading_thread_surfaces_at_its_own_step_and_stays() -> None:
    with open_loader(Recorder(bad=11)) as loader:
        assert [int(next(loader).micro_batches[0].input_ids[0, 0]) for _ in range(2)] == [2, 6]
        for _ in range(2):
            with pytest.raises(UserError, match="disk gone at 10"):
                next(loader)


def test_exactly_prefetch_steps_are_read_ahead() -> None:
    recorder = Recorder()
    with open_loader(recorder, prefetch=3) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(recorder.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert recorder.asked == [2, 6, 10, 14]


def test_close_waits_for_the_read_under_way_only_and_ends_the_thread() -> None:
    before = threading.active_count()
    recorder = Recorder(open_gate=False)
    loader = open_loader(recorder, prefetch=100)
    threading.Timer(0.1, recorder.gate.set).start()
    loader.close()
    assert recorder.asked == [2]
    assert list(loader) == []
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


@writes_files
@given(st.integers(2, 200), st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]), st.sampled_from([4, 8, 12]))
def test_validation_counts_every_target_once_over_all_ranks(tmp_path_factory, tokens, division, global_batch) -> None:
    world_size, micro_batch_size = division
    dataset = source(tmp_path_factory.mktemp("v") / "a", tokens)
    ranks = [
        ValidationData(
            *(dataset, SEQ_LEN, True),
            global_batch_size=global_batch,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    targets = torch.cat([batch.targets.flatten() for rank in batches for batch in rank])
    assert sorted(targets[targets != IGNORE_INDEX].tolist()) == list(range(1, tokens))
    # ZeRO stage 3 gathers weights in every forward pass: each rank needs as many of them, of equal shape.
    count = ranks[0].num_batches * global_batch // world_size // micro_batch_size
    assert {len(rank) for rank in batches} == {count}
    assert {batch.input_ids.shape for rank in batches for batch in rank} == {(micro_batch_size, SEQ_LEN)}
    for batch in (batch for rank in batches for batch in rank):
        real = batch.targets != IGNORE_INDEX
        assert torch.equal(batch.input_ids[real] + 1, batch.targets[real])
        assert batch.input_ids.min() >= 0
        assert batch.document_ids.dtype == torch.int32


def test_validation_can_be_repeated_and_limited(tmp_path: Path) -> None:
    def validation(max_batches: int | None) -> ValidationData:
        sizes = {"global_batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1}
        return ValidationData(dataset, SEQ_LEN, False, **sizes, max_batches=max_batches)

    dataset = source(tmp_path / "a", 100)
    whole, limited = validation(None), validation(2)
    first, again = ([batch.targets.tolist() for batch in whole] for _ in range(2))
    assert first == again
    assert (whole.num_batches, len(first)) == (4, 8)
    assert [batch.targets.tolist() for batch in limited] == first[:4]
    assert (validation(99).num_batches, limited.num_batches) == (4, 2)


def test_a_batch_moves_and_is_cut_as_a_whole() -> None:
    tensors = [torch.arange(12).reshape(4, 3), torch.arange(12, 24).reshape(4, 3), torch.ones(4, 3), torch.arange(4)]
    batch = Batch(*tensors)
    assert {tensor.device.type for tensor in vars(batch.to("meta", non_blocking=True)).values()} == {"meta"}
    part = batch[1:3]
    assert len(part) == 2
    for tensor, whole in zip(vars(part).values(), tensors, strict=True):
        assert torch.equal(tensor, whole[1:3])
    assert vars(Batch(*tensors[:2])[:1].to("cpu"))["document_ids"] is None


def masked_source(path: Path, tokens: int, seed: int, **settings) -> tuple[DataSource, np.ndarray]:
    mask = np.random.default_rng(seed).integers(0, 2, tokens)
    return DataSource(path=write_stream(path, tokens, mask=mask), **settings), mask


@writes_files
@given(st.integers(SEQ_LEN + 1, 200), st.integers(0, 2**32), st.integers(0, 300))
def test_masked_targets_are_ignored_in_training_and_inputs_stay(tmp_path_factory, tokens, seed, start) -> None:
    """Of two blended datasets one has a mask; the tokens of the other are told apart by their size."""
    folder = tmp_path_factory.mktemp("t")
    masked, mask = masked_source(folder / "masked", tokens, seed, weight=0.6)
    plain = DataSource(path=write_dataset(folder / "plain", [list(range(1000, 1100))]), weight=0.4)
    masked_blend = TrainingData([masked, plain], SEQ_LEN, seed, document_mask=False).read(start, 20)
    (folder / "masked.mask").unlink()
    batch = TrainingData([masked, plain], SEQ_LEN, seed, document_mask=False).read(start, 20)
    assert torch.equal(masked_blend.input_ids, batch.input_ids)
    learned = np.append(mask, np.ones(1100))[np.where(batch.targets < 1000, batch.targets, tokens)]
    assert np.array_equal(masked_blend.targets, np.where(learned, batch.targets, IGNORE_INDEX))
    assert {True, False} == set((batch.targets >= 1000).flatten().tolist())


@writes_files
@given(st.integers(2, 100), st.integers(0, 2**32))
def test_masked_targets_are_ignored_in_validation(tmp_path_factory, tokens, seed) -> None:
    validation, mask = masked_source(tmp_path_factory.mktemp("v") / "a", tokens, seed)
    batches = open_validation(validation)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets[targets != IGNORE_INDEX].tolist() == (np.flatnonzero(mask[1:]) + 1).tolist()
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    assert inputs[: tokens - 1].tolist() == list(range(tokens - 1))


def open_validation(validation: DataSource, token_bytes: np.ndarray | None = None) -> ValidationData:
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return ValidationData(validation, SEQ_LEN, False, token_bytes=token_bytes, **sizes)


GPT2 = load_tokenizer("gpt2")
TOKEN_BYTES = token_byte_lengths(GPT2)


@settings(writes_files, max_examples=20)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_bytes_of_validation_targets_are_those_of_the_decoded_text(tmp_path_factory, texts, random) -> None:
    """Texts of any characters: a token may be a part of one. Every token is a target but the first and the masked."""
    documents = [[*GPT2.encode(text), GPT2.eod_id] for text in texts]
    mask = [[random.randint(0, 1) for _ in document] for document in documents]
    with IndexedDatasetWriter(tmp_path_factory.mktemp("b") / "a", "u2", loss_mask=True) as writer:
        for document, learned in zip(documents, mask, strict=True):
            writer.add_document(document, learned)
    first = len(GPT2.decode_bytes(documents[0][:1]))
    whole = sum(len(text.encode()) for text in texts) - first
    pairs = [pair for document in zip(documents, mask, strict=True) for pair in zip(*document, strict=True)]
    learned = GPT2.decode_bytes([token for token, learned in pairs[1:] if learned and token != GPT2.eod_id])
    for expected in (len(learned), whole):
        batches = list(open_validation(DataSource(path=writer.prefix), TOKEN_BYTES))
        assert {(batch.target_bytes.shape, batch.target_bytes.dtype) for batch in batches} == {((2,), torch.int64)}
        assert sum(int(batch.target_bytes.sum()) for batch in batches) == expected
        mask_path(writer.prefix).unlink(missing_ok=True)
    assert next(iter(open_validation(DataSource(path=writer.prefix)))).target_bytes is None


def test_a_token_without_a_known_length_is_named(tmp_path: Path) -> None:
    validation = DataSource(path=write_dataset(tmp_path / "a", [[1, 2, 300]]))
    message = r"a\.bin: holds token id 300, but its tokenizer has 257 ids; make the dataset anew$"
    with pytest.raises(UserError, match=message):
        list(open_validation(validation, token_byte_lengths(load_tokenizer("bytes"))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs an NVIDIA GPU")
def test_micro_batches_are_pinned_for_the_gpu_in_use(data: TrainingData) -> None:
    windows = step_windows(BatchSizes(4), 0, 3)
    with BatchLoader(data, windows, micro_batch_size=2, rank=0, world_size=1, pin_memory=True) as loader:
        for batch in next(loader).micro_batches:
            assert all(tensor.is_pinned() for tensor in vars(batch).values() if tensor is not None)
            assert torch.equal(batch.to("cuda", non_blocking=True).targets.cpu(), batch.targets)


@writes_files
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True), st.integers(0, 2**32), st.booleans())
def test_data_that_does_not_fit_in_memory_is_read_the_same(tmp_path_factory, sizes, seed, document_mask) -> None:
    """Read page by page, as asked for, instead of with what is around."""
    folder = tmp_path_factory.mktemp("s")
    sources = [source(folder / str(number), SEQ_LEN + size) for number, size in enumerate(sizes)]
    small = TrainingData(sources, SEQ_LEN, seed, document_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megagpt.data.loader._MEMORY_SHARE", 0)
        large = TrainingData(sources, SEQ_LEN, seed, document_mask)
    assert all(dataset._mapping is None for dataset in small.datasets)
    assert all(dataset._mapping is not None for dataset in large.datasets)
    for start, count in ((0, 1), (5, 40)):
        batches = [data.read(start, count) for data in (small, large)]
        for name in ("input_ids", "targets", *["document_ids"] * document_mask):
            assert torch.equal(*(getattr(batch, name) for batch in batches))
