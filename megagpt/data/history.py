"""What a run has read of its datasets, blend by blend: stored in every checkpoint, so that the blend may change.

A run has a segment for every blend that it read samples of, from sample `start` of the global order on. Within it the
blend's sample n - start belongs to a dataset (megagpt.data.blend), which goes on at its own sample `offset`: where it
stood when it was last part of the blend. So no sample of a dataset comes again before its epoch ends, whatever happens
to the others. A dataset is known by its content; with other content it is a new one. Where seq_len changes, samples are
cut anew, so a dataset leaves the rest of its epoch out and begins the next one.
"""

import functools
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from megagpt.data.blend import Blend
from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import TokenizerInfo
from megagpt.data.order import ORDER_VERSION
from megagpt.data.samples import samples_per_epoch


class _Record(BaseModel):
    """Common behaviour: immutable, no unknown keys, docstrings are field descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DatasetIdentity(_Record):
    """What tells the content of a dataset from that of others; its path is no part of it."""

    documents: int = Field(ge=0)
    """Number of documents."""
    sequences: int = Field(ge=0)
    """Number of sequences."""
    tokens: int = Field(ge=0)
    """Number of tokens."""
    dtype: str
    """Type that the tokens are stored in."""
    edge_hash: str
    """Hash of both ends of its files, the loss mask's included (IndexedDataset.edge_hash)."""

    @classmethod
    def of(cls, dataset: IndexedDataset) -> "DatasetIdentity":
        """The identity of an open dataset."""
        return cls(
            documents=dataset.num_documents,
            sequences=len(dataset),
            tokens=dataset.num_tokens,
            dtype=str(dataset.dtype),
            edge_hash=dataset.edge_hash(),
        )


class BlendedDataset(_Record):
    """A dataset's part in a segment."""

    name: str
    """What metrics and messages call it; decides nothing."""
    weight: float = Field(gt=0)
    """Its share of the samples, relative to the sum of the segment's weights."""
    offset: int = Field(0, ge=0)
    """Number, in its own order, of the first sample that the segment reads of it."""
    epochs: float = Field(0.0, ge=0)
    """How often it was read before the segment."""
    identity: DatasetIdentity
    """Its content."""


class Segment(_Record):
    """A blend, and where it begins."""

    start: int = Field(ge=0)
    """First sample of the global order that it decides."""
    seq_len: int = Field(gt=0)
    """Tokens a sample."""
    tokenizer: TokenizerInfo | None
    """The tokenizer of its datasets; null: no dataset has a manifest."""
    datasets: list[BlendedDataset] = Field(min_length=1)
    """Its datasets; their order decides between datasets of which either could be next."""

    def blend(self) -> Blend:
        """The sequence of datasets that the segment draws from."""
        return _blend(tuple(dataset.weight for dataset in self.datasets))


@functools.lru_cache(maxsize=2)
def _blend(weights: tuple[float, ...]) -> Blend:
    """A blend of a thousand datasets takes half a second to lay out; most resumes find the one that they had."""
    return Blend(weights)


class BlendHistory(_Record):
    """All that decides which sample of a run is which, from its first sample on."""

    order_version: int = ORDER_VERSION
    """Version of the rule that orders samples."""
    seed: int
    """Seed of the order."""
    segments: list[Segment] = Field(min_length=1)
    """The blends of the run, oldest first."""

    @property
    def current(self) -> Segment:
        """The segment that the run is in."""
        return self.segments[-1]


class Difference(NamedTuple):
    """Something that decides which samples a run reads, and is not as it was."""

    kind: Literal["data", "tokenizer", "seq_len", "seed"]
    """What the user may allow to change; a seed (or another rule of order) nobody may."""
    text: str
    """One line for people: "web/train: weight 0.7, was 0.5"."""


def continue_history(
    history: BlendHistory, consumed: int, configured: BlendHistory
) -> tuple[BlendHistory, list[Difference]]:
    """How a run with this history, of which it read `consumed` samples, goes on with the datasets configured now.

    configured: the history of a run that would start with them (TrainingData.history). Returns the history to go on
    with and what differs from the blend so far. Without differences the blend goes on, whatever the order in which its
    datasets are listed now, and only what people read (names, the scale of the weights) is as configured. Else a
    segment begins at `consumed`, instead of the last one if nothing was read of that.
    """
    assert consumed >= history.current.start, f"sample {consumed} is before the run's blend of {history.current.start}"
    differences = _differences(history, configured)
    drawn = [segment for segment in history.segments if segment.start < consumed]
    if differences:
        segments = [*drawn, _follow(drawn, consumed, configured.current)]
    else:
        segments = [*history.segments[:-1], _relabelled(history.current, configured.current)]
    return configured.model_copy(update={"segments": segments}), differences


class _Progress(NamedTuple):
    """Where a dataset stood when it was last read."""

    seq_len: int
    next_sample: int
    epochs: float


def _follow(segments: Sequence[Segment], consumed: int, configured: Segment) -> Segment:
    """The segment of the datasets of `configured` that begins at `consumed`, after `segments`."""
    progress = _progress(segments, consumed, {dataset.identity for dataset in configured.datasets})
    datasets = []
    for dataset in configured.datasets:
        if before := progress.get(dataset.identity):
            offset, tokens = before.next_sample, dataset.identity.tokens
            if before.seq_len != configured.seq_len:
                epochs_begun = -(-offset // samples_per_epoch(tokens, before.seq_len))
                offset = epochs_begun * samples_per_epoch(tokens, configured.seq_len)
            dataset = dataset.model_copy(update={"offset": offset, "epochs": before.epochs})
        datasets.append(dataset)
    return configured.model_copy(update={"start": consumed, "datasets": datasets})


def _progress(
    segments: Sequence[Segment], end: int, wanted: Collection[DatasetIdentity]
) -> dict[DatasetIdentity, _Progress]:
    """Where those of the `wanted` datasets stood that `segments` read, the last of which ends at `end`."""
    found: dict[DatasetIdentity, _Progress] = {}
    for segment in reversed(segments):
        if any(dataset.identity in wanted and dataset.identity not in found for dataset in segment.datasets):
            counts = segment.blend().counts(end - segment.start).tolist()
            for dataset, count in zip(segment.datasets, counts, strict=True):
                epochs = dataset.epochs + count / samples_per_epoch(dataset.identity.tokens, segment.seq_len)
                found.setdefault(dataset.identity, _Progress(segment.seq_len, dataset.offset + count, epochs))
        end = segment.start
    return found


def _relabelled(segment: Segment, configured: Segment) -> Segment:
    """The segment with the names, weights and tokenizer of `configured`, which blends the same datasets equally."""
    now = {dataset.identity: dataset for dataset in configured.datasets}
    datasets = [
        dataset.model_copy(update={"name": now[dataset.identity].name, "weight": now[dataset.identity].weight})
        for dataset in segment.datasets
    ]
    return segment.model_copy(update={"datasets": datasets, "tokenizer": configured.tokenizer or segment.tokenizer})


def _differences(history: BlendHistory, configured: BlendHistory) -> list[Difference]:
    then, now = history.current, configured.current
    found = []
    if configured.seed != history.seed:
        found.append(Difference("seed", f"seed: {configured.seed}, was {history.seed}"))
    if configured.order_version != history.order_version:
        versions = f"version {configured.order_version}, was {history.order_version}"
        found.append(Difference("seed", f"rule that orders samples: {versions}"))
    # A dataset without a manifest says nothing about its tokenizer, so neither to nor from it is a change.
    if then.tokenizer and now.tokenizer and then.tokenizer.vocab_sha256 != now.tokenizer.vocab_sha256:
        found.append(Difference("tokenizer", f"tokenizer: {_vocabulary(now)}, was {_vocabulary(then)}"))
    if now.seq_len != then.seq_len:
        found.append(Difference("seq_len", f"seq_len: {now.seq_len}, was {then.seq_len}"))
    earlier = {dataset.identity for segment in history.segments[:-1] for dataset in segment.datasets}
    return found + [Difference("data", text) for text in _blend_differences(then, now, earlier)]


def _vocabulary(segment: Segment) -> str:
    assert segment.tokenizer is not None
    return f"{segment.tokenizer.name} ({segment.tokenizer.vocab_sha256[:12]}...)"


def _blend_differences(then: Segment, now: Segment, earlier: Collection[DatasetIdentity]) -> list[str]:
    """A line for each dataset that is new, gone, another or of another weight, in the order of `now`."""
    before = {dataset.identity: dataset for dataset in then.datasets}
    after = {dataset.identity for dataset in now.datasets}
    gone = {dataset.name: dataset for dataset in then.datasets if dataset.identity not in after}
    same_shares = _shares(then) == _shares(now)
    lines = []
    for dataset in now.datasets:
        if old := before.get(dataset.identity):
            if not same_shares and old.weight != dataset.weight:
                lines.append(f"{dataset.name}: weight {dataset.weight}, was {old.weight}")
            continue
        replaced = gone.pop(dataset.name, None)
        if dataset.identity in earlier:
            lines.append(f"{dataset.name}: back, as it was in an earlier part of the run")
        elif replaced:
            lines.append(f"{dataset.name}: other content: {_content_change(replaced.identity, dataset.identity)}")
        else:
            lines.append(f"{dataset.name}: new")
    return lines + [f"{name}: removed" for name in gone]


def _shares(segment: Segment) -> dict[DatasetIdentity, Fraction]:
    """The exact share of each dataset; a weight of 0.1 is a tenth, as in `Blend`."""
    weights = {dataset.identity: Fraction(str(dataset.weight)) for dataset in segment.datasets}
    total = sum(weights.values())
    return {identity: weight / total for identity, weight in weights.items()}


def _content_change(then: DatasetIdentity, now: DatasetIdentity) -> str:
    for count in ("tokens", "documents", "sequences"):
        if getattr(now, count) != getattr(then, count):
            return f"{getattr(now, count):,} {count}, were {getattr(then, count):,}"
    if now.dtype != then.dtype:
        return f"stored as {now.dtype}, was {then.dtype}"
    return "as many tokens, but others, or another loss mask"
