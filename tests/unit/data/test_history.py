"""Blends that change during a run: every dataset goes on where it was, and what changed is said."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt.config.schema import DataSource
from megagpt.data.history import BlendHistory, Difference, continue_history
from megagpt.data.indexed import IndexedDataset
from megagpt.data.loader import TrainingData
from megagpt.data.samples import TokenSamples
from tests.unit.data.reference import write_dataset, writes_files
from tests.unit.data.test_manifest import save_manifest

SEED = 3
SIZES = [60, 100, 140, 45, 33]
NAMES = "abcde"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets a to e; token 1000 x number + position says where it is from."""
    folder = tmp_path_factory.mktemp("blend")
    for number, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        write_dataset(folder / name, [list(range(1000 * number, 1000 * number + size))])
    return folder


def open_data(folder: Path, weights: dict[str, float], seq_len: int = 8, seed: int = SEED) -> TrainingData:
    sources = [DataSource(path=str(folder / name), weight=weight, name=name) for name, weight in weights.items()]
    return TrainingData(sources, seq_len, seed, document_mask=False)


def resume(data: TrainingData, checkpoint: str | None, consumed: int) -> list[Difference]:
    """Have `data` go on from a checkpoint's history in JSON, as a new process does."""
    if checkpoint is None:
        return []
    history, differences = continue_history(BlendHistory.model_validate_json(checkpoint), consumed, data.history)
    data.follow(history)
    return differences


def changes(data: TrainingData, checkpoint: TrainingData, consumed: int = 10) -> list[tuple[str, str]]:
    return [tuple(difference) for difference in resume(data, checkpoint.history.model_dump_json(), consumed)]


WEIGHTS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.3]), min_size=1)
STAGES = st.lists(st.tuples(WEIGHTS, st.sampled_from([8, 8, 8, 5]), st.integers(0, 40)), min_size=1, max_size=5)


class Reference:
    """One dataset read sample by sample: which sample comes next is counted, not computed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.dataset = IndexedDataset(folder / name)
        self.number, self.epochs, self.seq_len = 0, 0.0, 0
        self.seen: set[tuple[int, int, int]] = set()

    def enter(self, seq_len: int) -> None:
        if seq_len != self.seq_len:
            epochs_begun = -(-self.number // len(self.samples)) if self.seq_len else 0
            self.samples, self.seq_len = TokenSamples(self.dataset, seq_len, SEED), seq_len
            self.number = epochs_begun * len(self.samples)

    def next(self) -> list[int]:
        tokens = self.samples.read([self.number]).tokens[0]
        key = (self.seq_len, self.number // len(self.samples), int(tokens[0]))
        assert key not in self.seen, "a sample came twice in an epoch"
        self.seen.add(key)
        self.number += 1
        self.epochs += 1 / len(self.samples)
        return tokens.tolist()


@settings(writes_files, max_examples=40)
@given(STAGES)
def test_datasets_go_on_where_they_were_through_any_changes_of_the_blend(folder: Path, stages) -> None:
    """Every stage is a process that resumes with other weights, datasets or seq_len, and reads some samples.

    Within each segment the counts follow the weights, and over the whole run every dataset is read in its own order,
    without a gap or a repeated sample; with another seq_len from the beginning of its next epoch.
    """
    references = {name: Reference(folder, name) for name in NAMES}
    checkpoint, consumed = None, 0
    counts: dict[str, int] = defaultdict(int)
    for weights, seq_len, count in stages:
        data = open_data(folder, weights, seq_len)
        resume(data, checkpoint, consumed)
        checkpoint = data.history.model_dump_json()
        if data.history.current.start == consumed:
            counts.clear()
        batch = data.read(consumed, count) if count else None
        for name in weights if count else []:
            references[name].enter(seq_len)
        for row in range(count):
            tokens = [*batch.input_ids[row].tolist(), int(batch.targets[row, -1])]
            name = NAMES[tokens[0] // 1000]
            assert tokens == references[name].next()
            counts[name] += 1
            drawn, total = sum(counts.values()), sum(weights.values())
            assert all(abs(counts[name] - drawn * weight / total) < 1 for name, weight in weights.items())
        consumed += count
        assert data.epochs(consumed) == pytest.approx({name: references[name].epochs for name in weights})
    starts = [segment.start for segment in data.history.segments]
    assert starts == sorted(set(starts))
    assert starts[0] == 0


def test_an_unchanged_run_reads_what_it_would_have_read_uninterrupted(folder: Path) -> None:
    whole, part = open_data(folder, {"a": 0.7, "b": 0.3}), open_data(folder, {"a": 0.7, "b": 0.3})
    history, differences = continue_history(whole.history, 17, part.history)
    assert (history, differences) == (whole.history, [])
    part.follow(history)
    assert part.read(17, 30).input_ids.tolist() == whole.read(17, 30).input_ids.tolist()
    assert part.history == whole.history


@pytest.mark.parametrize("listed", [{"b": 0.3, "a": 0.7}, {"a": 7.0, "b": 3.0}, {"b": 0.6, "a": 1.4}])
def test_the_order_of_the_list_and_the_scale_of_the_weights_are_no_change(folder: Path, listed) -> None:
    whole, now = open_data(folder, {"a": 0.7, "b": 0.3}), open_data(folder, listed)
    assert changes(now, whole, 17) == []
    assert now.read(17, 30).input_ids.tolist() == whole.read(17, 30).input_ids.tolist()
    assert {dataset.name: dataset.weight for dataset in now.history.current.datasets} == listed
    assert now.epochs(100) == whole.epochs(100)


def test_a_renamed_or_moved_dataset_is_the_same_under_its_new_name(folder: Path) -> None:
    whole = open_data(folder, {"a": 1.0})
    now = TrainingData([DataSource(path=str(folder / "a"), name="new")], 8, SEED, False)
    assert changes(now, whole, 17) == []
    assert now.epochs(17) == {"new": whole.epochs(17)["a"]}
    assert [dataset.name for dataset in now.history.current.datasets] == ["new"]


def test_each_change_of_the_blend_is_told_in_a_line_of_its_dataset(folder: Path, tmp_path: Path) -> None:
    before = open_data(folder, {"a": 0.5, "b": 0.3, "c": 0.2})
    now = open_data(folder, {"d": 0.1, "c": 0.2, "a": 0.7})
    assert changes(now, before) == [("data", "d: new"), ("data", "a: weight 0.7, was 0.5"), ("data", "b: removed")]
    back = open_data(folder, {"c": 0.2, "b": 0.3})
    assert changes(back, now, 20) == [
        ("data", "b: back, as it was in an earlier part of the run"),
        ("data", "d: removed"),
        ("data", "a: removed"),
    ]
    contents = {
        "tokens": [list(range(61))],
        "documents": [list(range(30)), list(range(30))],
        "others": [[7] * 60],
    }
    expected = {
        "tokens": "61 tokens, were 60",
        "documents": "2 documents, were 1",
        "others": "as many tokens, but others, or another loss mask",
        "stored": "stored as int32, was uint16",
    }
    for name, documents in contents.items():
        write_dataset(tmp_path / name / "a", documents)
    write_dataset(tmp_path / "stored" / "a", [list(range(60))], "i4")
    for name, text in expected.items():
        replaced = open_data(tmp_path / name, {"a": 1.0})
        assert changes(replaced, open_data(folder, {"a": 1.0})) == [("data", f"a: other content: {text}")]
        assert replaced.epochs(10) == {"a": 0.0}
        restored = open_data(folder, {"a": 1.0})
        assert changes(restored, replaced, 20) == [("data", "a: back, as it was in an earlier part of the run")]
        assert restored.epochs(20) == {"a": 10 / 6}


def test_a_change_before_any_sample_was_read_replaces_the_segment(folder: Path) -> None:
    now = open_data(folder, {"a": 1.0})
    assert changes(now, open_data(folder, {"b": 1.0}), 0) == [("data", "a: new"), ("data", "b: removed")]
    assert now.history == open_data(folder, {"a": 1.0}).history
    changed = open_data(folder, {"a": 1.0, "b": 1.0})
    changes(changed, now, 10)
    again = open_data(folder, {"a": 1.0, "c": 1.0})
    assert changes(again, changed, 10) == [("data", "c: new"), ("data", "b: removed")]
    assert [segment.start for segment in again.history.segments] == [0, 10]


def test_seq_len_seed_and_rule_of_order_are_kinds_of_their_own(folder: Path) -> None:
    before = open_data(folder, {"a": 1.0})
    assert changes(open_data(folder, {"a": 1.0}, seq_len=5), before) == [("seq_len", "seq_len: 5, was 8")]
    now = open_data(folder, {"a": 2.0, "b": 1.0}, seq_len=5, seed=4)
    kinds = [kind for kind, _ in changes(now, before)]
    assert kinds == ["seed", "seq_len", "data", "data"]
    assert changes(open_data(folder, {"a": 1.0}, seed=4), before) == [("seed", "seed: 4, was 3")]
    before.history = before.history.model_copy(update={"order_version": 0})
    now = open_data(folder, {"a": 1.0})
    assert changes(now, before) == [("seed", "rule that orders samples: version 1, was 0")]


def test_another_tokenizer_is_a_change_but_not_an_unknown_one(folder: Path, tmp_path: Path) -> None:
    """The same tokens under manifests of other tokenizers, and without one."""

    def data(**tokenizer: Any) -> TrainingData:
        if tokenizer:
            save_manifest(tmp_path / "a", **tokenizer)
        else:
            (tmp_path / "manifest.json").unlink(missing_ok=True)
        return open_data(tmp_path, {"a": 1.0})

    write_dataset(tmp_path / "a", [[1] * 50])
    one, other, unknown = data(name="one", vocab_sha256="1" * 64), data(name="other", vocab_sha256="2" * 64), data()
    expected = f"tokenizer: other ({'2' * 12}...), was one ({'1' * 12}...)"
    assert changes(other, one) == [("tokenizer", expected)]
    assert other.epochs(10) == open_data(tmp_path, {"a": 1.0}).epochs(10)
    assert changes(unknown, one) == []
    assert unknown.history.current.tokenizer.name == "one"  # what is known is kept
    later = data(name="other", vocab_sha256="2" * 64)
    assert changes(later, unknown) == [("tokenizer", expected)]
    assert changes(data(name="one", vocab_sha256="1" * 64), data()) == []


def test_the_history_is_json_and_refuses_keys_that_it_does_not_know(folder: Path) -> None:
    data = open_data(folder, {"a": 0.1, "b": 0.7})
    changes(data, open_data(folder, {"a": 1 / 3, "c": 1.0}), 11)
    content = json.loads(json.dumps(data.history.model_dump(mode="json")))
    assert BlendHistory.model_validate(content) == data.history
    for place in (content, content["segments"][0], content["segments"][0]["datasets"][0]):
        place["more"] = 1
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            BlendHistory.model_validate(content)
        del place["more"]


def test_samples_before_the_current_blend_are_never_read_by_mistake(folder: Path) -> None:
    data = open_data(folder, {"a": 1.0})
    changes(data, open_data(folder, {"b": 1.0}), 10)
    with pytest.raises(AssertionError, match="sample 9 is before the blend that begins at 10"):
        data.read(9, 1)
