"""How fast training samples come out of token datasets: reading, opening huge ones, random access, blends, resuming.

The datasets are generated. The huge one has a whole index and a .bin without content (a sparse file that takes no
disk), so its pages are not read from the disk but made when they are touched; what a disk needs comes on top. Each
measurement is a process of its own, one at a time, without what it takes to import torch.
"""

import hashlib
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megagpt.benchmark.fresh import call, forget_peak, peak_bytes, resident_bytes
from megagpt.benchmark.targets import Target
from megagpt.data.indexed import DTYPES, MAGIC, VERSION, IndexedDataset, bin_path, idx_path
from megagpt.errors import UsageError, UserError

if TYPE_CHECKING:
    from megagpt.data.loader import TrainingData

Result = dict[str, Any]
"""JSON types."""

SEQ_LEN = 1024
VOCAB_SIZE = 50_257
STEP_SAMPLES = 32
RESUME_STEP = 1_000_000
TARGETS = {
    "loader": Target(20e6, "million tokens/s", at_least=True, scale=1e6),
    "seconds": Target(1.0, "s"),
    "bytes": Target(200e6, "MB", scale=1e6),
    "access": Target(100e-6, "us", scale=1e-6),
    "blend": Target(2.0, "s"),
    "resume": Target(1.0, "s"),
}
_DTYPE = np.dtype("<u2")
_READ_TOKENS = 100_000_000  # of the dataset that is read: it fits in memory, as what is read ahead does
_READ_STEPS = 150  # of a turn
_ACCESSES = 1000  # of a turn
_BLENDED_TOKENS = 50_000  # of each dataset of the blend
_DOCUMENT_TOKENS = 1000
_MEAN_LENGTH = 10_000_000  # of random lengths that never reach 2^31
_CHUNK = 1 << 22
_MODULE = "megagpt.benchmark.data"


@dataclass(frozen=True)
class DataBenchmark:
    """What all measurements are given."""

    folder: Path
    """Scratch space: about 20 bytes a document, and 0.4 GB."""
    tokens: int
    """Of the huge dataset."""
    documents: int
    """Of it."""
    datasets: int
    """Of the blend."""
    repeats: int
    """Turns of every measurement."""
    report: Callable[[str], None]
    """Is given a line about each result."""

    def run(self) -> Result:
        """All results, by name; JSON types.

        UserError: the disk refuses, or a measured process failed. UsageError: the documents would be too long.
        """
        if self.tokens // self.documents > _MEAN_LENGTH:
            raise UsageError(
                f"--documents {self.documents}: for {self.tokens} tokens a document would be too long for an index, "
                "which counts to 2^31; give more documents"
            )
        try:
            huge = self._write_huge()
            blend = self._write_blend()
            read = self._write_read()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}; choose another --folder") from error
        disk = sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*"))
        self.report(f"scratch: {disk / 1e9:.2f} GB of disk in {self.folder}")
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "datasets": self.datasets,
            "seq_len": SEQ_LEN,
            "disk_bytes": disk,
            "loader": self._loader(read),
            "opening": self._opening(huge),
            "access": self._access(huge),
            "blend": self._blend(blend),
            "resume": self._resume(huge),
        }

    def _loader(self, prefix: str) -> Result:
        found = call(_MODULE, "read_in_turns", {"prefix": prefix, "repeats": self.repeats}, cpus=1)
        rates = {
            name: STEP_SAMPLES * SEQ_LEN * found["steps"] / statistics.median(seconds)
            for name, seconds in found["seconds"].items()
        }
        more = f"{found['ratio']['median']:.2f} x a plain memmap loop, pair by pair {_span(found['ratio'])}"
        judged = TARGETS["loader"].judge(
            "loader, one core",
            rates["megagpt"],
            self.report,
            more,
            [STEP_SAMPLES * SEQ_LEN * found["steps"] / seconds for seconds in found["seconds"]["megagpt"]],
        )
        for name, rate in rates.items():
            self.report(f"loader: {name}: {rate / 1e6:.1f} million tokens/s")
        return {"tokens_per_second": rates, "ratio": found["ratio"], "rate": judged}

    def _opening(self, prefix: str) -> Result:
        """The dataset alone, and as a run opens it; in processes of their own each time."""
        alone = self._fresh("open_dataset", {"prefix": prefix})
        sources = [{"path": prefix}]
        training = self._fresh("open_training", {"sources": sources})
        return {
            "dataset_seconds": self._judged("seconds", "opening the dataset", alone["seconds"]),
            "dataset_bytes": self._judged("bytes", "  memory of the whole process", alone["bytes"]),
            "training_seconds": self._judged(
                "seconds", "opening it for training, to the first batch", training["seconds"]
            ),
            "training_bytes": self._judged("bytes", "  memory beside the imports", training["bytes"]),
            "import_bytes": statistics.median(training["import_bytes"]),
        }

    def _access(self, prefix: str) -> Result:
        found = call(_MODULE, "access_in_turns", {"prefix": prefix, "repeats": self.repeats}, cpus=1)
        return {
            name: self._judged(
                "access", f"random access, {name}", times["medians"], f"99% within {times['p99'] * 1e6:.0f} us"
            )
            | {"p99": times["p99"]}
            for name, times in found.items()
        }

    def _blend(self, sources: Sequence[Result]) -> Result:
        found = self._fresh("open_training", {"sources": list(sources)})
        name = f"start of a blend of {self.datasets:,} datasets, to the first batch"
        return {
            "seconds": self._judged("blend", name, found["seconds"]),
            "bytes": statistics.median(found["bytes"]),
        }

    def _resume(self, prefix: str) -> Result:
        """A run goes on at RESUME_STEP with what its checkpoint says of the data; the batch must be the right one."""
        sources = [{"path": prefix}]
        whole = call(_MODULE, "run_through", {"sources": sources})
        found = self._fresh("resume", {"sources": sources, "history": whole["history"]})
        if set(found["batch"]) != {whole["batch"]}:
            raise UserError(f"the batch of step {RESUME_STEP:,} after a resume is another one than in a run without")
        seconds = self._judged("resume", f"resume at step {RESUME_STEP:,}, to its batch", found["seconds"], "the same")
        return {"step": RESUME_STEP, "seconds": seconds, "same_batch": True}

    def _fresh(self, function: str, arguments: Result) -> dict[str, list[Any]]:
        """What `repeats` processes return, by key."""
        runs = [call(_MODULE, function, arguments) for _ in range(self.repeats)]
        return {key: [run[key] for run in runs] for key in runs[0]}

    def _judged(self, target: str, name: str, values: Sequence[float], more: str = "") -> Result:
        return TARGETS[target].judge(name, statistics.median(values), self.report, more, values)

    def _write_huge(self) -> str:
        """Documents of random lengths: a whole index, and tokens of zeros that take no disk."""
        prefix = self.folder / "huge"
        ends = np.sort(np.random.default_rng(0).integers(0, self.tokens + 1, self.documents))
        ends[-1] = self.tokens
        _write_index(prefix, np.diff(ends, prepend=0))
        with open(bin_path(prefix), "wb") as file:
            file.truncate(self.tokens * _DTYPE.itemsize)
        return str(prefix)

    def _write_blend(self) -> list[Result]:
        """Folders as tools.preprocess leaves them, with random weights, for which the longest block is needed."""
        from megagpt.data.manifest import Manifest, SplitInfo, TokenizerInfo

        tokenizer = TokenizerInfo(name="gpt2", vocab_sha256="0" * 64, vocab_size=VOCAB_SIZE, eod_id=VOCAB_SIZE - 1)
        random = np.random.default_rng(1)
        sources = []
        for number in range(self.datasets):
            folder = self.folder / f"blend/{number:04d}"
            folder.mkdir(parents=True)
            documents = _write_random(folder / "train", _BLENDED_TOKENS, random)
            split = SplitInfo(documents=documents, sequences=documents, tokens=_BLENDED_TOKENS)
            manifest = Manifest(tokenizer=tokenizer, splits={"train": split})
            (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
            sources.append({"path": str(folder / "train"), "weight": round(float(random.uniform(0.1, 10)), 3)})
        return sources

    def _write_read(self) -> str:
        """What the loader reads; no larger than the huge dataset, so that tests are fast."""
        prefix = self.folder / "read"
        _write_random(prefix, min(self.tokens, _READ_TOKENS), np.random.default_rng(2))
        return str(prefix)


def _write_random(prefix: Path, tokens: int, random: np.random.Generator) -> int:
    """Random tokens in documents of _DOCUMENT_TOKENS, the last one shorter; returns the number of documents."""
    with open(bin_path(prefix), "wb") as file:
        for start in range(0, tokens, _CHUNK):
            random.integers(0, VOCAB_SIZE, min(_CHUNK, tokens - start), _DTYPE).tofile(file)
    documents = -(-tokens // _DOCUMENT_TOKENS)
    lengths = np.full(documents, _DOCUMENT_TOKENS)
    lengths[-1] = tokens - _DOCUMENT_TOKENS * (documents - 1)
    _write_index(prefix, lengths)
    return documents


def _write_index(prefix: Path, lengths: npt.NDArray[np.int64]) -> None:
    """The .idx of documents of one sequence each; for .bin files that the writer of datasets would not make."""
    code = next(code for code, dtype in DTYPES.items() if dtype == _DTYPE)
    with open(idx_path(prefix), "wb") as file:
        file.write(struct.pack("<9sQBQQ", MAGIC, VERSION, code, lengths.size, lengths.size + 1))
        lengths.astype("<i4").tofile(file)
        ((np.cumsum(lengths) - lengths) * _DTYPE.itemsize).astype("<i8").tofile(file)
        np.arange(lengths.size + 1, dtype="<i8").tofile(file)


def _span(ratio: Result) -> str:
    return f"{ratio['min']:.2f} to {ratio['max']:.2f}"


# In processes of their own


def open_dataset(arguments: Result) -> Result:
    """Open the dataset and read its first, middle and last document; torch is not imported."""
    started = time.perf_counter()
    dataset = IndexedDataset(arguments["prefix"])
    for document in (0, dataset.num_documents // 2, dataset.num_documents - 1):
        dataset.document(document).sum()
    return {"seconds": time.perf_counter() - started, "bytes": peak_bytes()}


def open_training(arguments: Result) -> Result:
    """Open the datasets as a run does and wait for the first batch."""
    imported = _after_imports()
    started = time.perf_counter()
    data = _training_data(arguments["sources"])
    _batch_of_step(data, 0)
    return {
        "seconds": time.perf_counter() - started,
        "bytes": peak_bytes() - imported,
        "import_bytes": imported,
    }


def run_through(arguments: Result) -> Result:
    """What a run that was never interrupted reads in step RESUME_STEP, and what its checkpoint says of the data."""
    data = _training_data(arguments["sources"])
    batch = data.read(RESUME_STEP * STEP_SAMPLES, STEP_SAMPLES)
    return {"history": data.history.model_dump_json(), "batch": _digest(batch.input_ids.numpy())}


def resume(arguments: Result) -> Result:
    """Open the datasets, go on from the history of a checkpoint after RESUME_STEP steps, wait for the batch."""
    from megagpt.data.history import BlendHistory, continue_history

    _after_imports()
    started = time.perf_counter()
    data = _training_data(arguments["sources"])
    history = BlendHistory.model_validate_json(arguments["history"])
    continued, differences = continue_history(history, RESUME_STEP * STEP_SAMPLES, data.history)
    assert not differences, differences
    data.follow(continued)
    batch = _batch_of_step(data, RESUME_STEP)
    return {"seconds": time.perf_counter() - started, "batch": _digest(batch)}


def read_in_turns(arguments: Result) -> Result:
    """Steps by the loader, without and with a document mask, and by a plain loop; on the one core that is allowed."""
    import torch

    from megagpt.benchmark.turns import ratio, take_turns

    torch.set_num_threads(1)
    sources = [{"path": arguments["prefix"]}]
    data, masked = _training_data(sources), _training_data(sources, document_mask=True)
    stream = np.memmap(f"{arguments['prefix']}.bin", _DTYPE, "r")
    contenders: dict[str, Callable[[], object]] = {
        "megagpt": lambda: _read_steps(data),
        "plain memmap loop": lambda: [_plain_batch(stream) for _ in range(_READ_STEPS)],
        "megagpt, with document mask": lambda: _read_steps(masked),
    }
    take_turns(contenders, 1)
    seconds = take_turns(contenders, arguments["repeats"])
    compared = ratio(seconds["plain memmap loop"], seconds["megagpt"])
    return {"seconds": seconds, "steps": _READ_STEPS, "ratio": compared}


def access_in_turns(arguments: Result) -> Result:
    """Seconds that single samples take, drawn from ten epochs, without and with a document mask, by turn."""
    import torch

    torch.set_num_threads(1)
    sources = [{"path": arguments["prefix"]}]
    readers = {"no mask": _training_data(sources), "document mask": _training_data(sources, document_mask=True)}
    random = np.random.default_rng(3)
    times: dict[str, list[list[float]]] = {name: [] for name in readers}
    for _ in range(arguments["repeats"]):
        for name, data in readers.items():
            turn = []
            for sample in random.integers(0, 10 * data.datasets[0].num_tokens // SEQ_LEN, _ACCESSES).tolist():
                started = time.perf_counter()
                data.read(sample, 1)
                turn.append(time.perf_counter() - started)
            times[name].append(turn)
    return {
        name: {"medians": [statistics.median(turn) for turn in turns], "p99": float(np.quantile(turns, 0.99))}
        for name, turns in times.items()
    }


def _after_imports() -> int:
    """Import what opening needs; the resident set then."""
    import megagpt.data.loader  # noqa: F401

    forget_peak()
    return resident_bytes()


def _training_data(sources: Sequence[Result], document_mask: bool = False) -> "TrainingData":
    from megagpt.config.schema import DataSource
    from megagpt.data.loader import TrainingData

    return TrainingData([DataSource(**source) for source in sources], SEQ_LEN, 0, document_mask, VOCAB_SIZE)


def _batch_of_step(data: "TrainingData", step: int) -> npt.NDArray[np.int64]:
    """The inputs of a step, by the loader."""
    return next(iter(_steps(data, step, 1)))


def _read_steps(data: "TrainingData") -> None:
    for _ in _steps(data, 0, _READ_STEPS):
        pass


def _steps(data: "TrainingData", first: int, count: int) -> Any:
    from megagpt.config.batch import BatchSizes
    from megagpt.data.loader import BatchLoader, step_windows

    windows = step_windows(BatchSizes(STEP_SAMPLES), first * STEP_SAMPLES, count)
    with BatchLoader(data, windows, micro_batch_size=STEP_SAMPLES, rank=0, world_size=1) as loader:
        for batches in loader:
            yield batches.micro_batches[0].input_ids.numpy()


def _plain_batch(stream: npt.NDArray[np.uint16]) -> tuple[Any, Any]:
    """Random windows of a memory-mapped file, as nanoGPT's training script draws them."""
    import torch

    starts = torch.randint(len(stream) - SEQ_LEN, (STEP_SAMPLES,)).tolist()
    inputs = [torch.from_numpy(stream[start : start + SEQ_LEN].astype(np.int64)) for start in starts]
    targets = [torch.from_numpy(stream[start + 1 : start + 1 + SEQ_LEN].astype(np.int64)) for start in starts]
    return torch.stack(inputs), torch.stack(targets)


def _digest(batch: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(batch).tobytes()).hexdigest()
