"""How fast a corpus becomes a token dataset, on generated text (megagpt.corpus.sample_text).

Everything is measured several times, the contenders in turns (A B A B ...), so that whatever else the machine does
slows all of them; the medians count. Whole runs are `preprocess` in a process of its own, by the times of its report;
MB are 10^6 bytes of text.
"""

import importlib.metadata
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megagpt.benchmark.corpus_peers import NUM_PERM, SHINGLE_WORDS, check_datatrove, shingles
from megagpt.benchmark.corpus_runs import Result, child
from megagpt.benchmark.turns import ratio, take_turns
from megagpt.convert.tokenizers import to_huggingface
from megagpt.corpus.sample_text import TRUTH_NAME, sample_documents, write_sample_corpus
from megagpt.tokenizer import load_tokenizer

PARTS = ("signatures", "bands", "tokenize", "dedup", "pipeline", "linear")
"""What can be measured, see the functions of these names."""

DOCUMENT_BYTES, SHORT_DOCUMENT_BYTES = 8000, 400
LINEAR_MEGABYTES, LARGE_MEGABYTES = (1, 3, 10, 30, 100, 300), 1000
OTHER = "other"
"""What is no stage of a run: planning it, and publishing the dataset."""
_RAW: Result = {"clean": {"enabled": False}, "tokenizer": "gpt2"}
_EXACT_AND_NEAR: Result = {**_RAW, "dedup": {"method": "minhash"}}
_RunOnce = Callable[[], Result]
"""A run of a contender: its seconds, peak_bytes, and what else it tells (stages: seconds by name; removed: documents).
"""


@dataclass(frozen=True)
class Benchmark:
    """What all measurements are given."""

    folder: Path
    """Scratch space, several times the size of the text."""
    megabytes: float
    """Text of a measurement."""
    workers: int
    """Processes; also measured with one, where the gain is the point."""
    repeats: int
    """Times that everything is measured."""
    filter_config: Path
    """Configuration of a corpus whose cleaning and filters `pipeline` measures."""
    large: bool
    """Whether `linear` goes on to 1,000 MB."""
    datatrove: bool
    """Whether `dedup` and `pipeline` compare with it."""
    report: Callable[[str], None]
    """Is given a line about each result."""

    def run(self, parts: Sequence[str]) -> Result:
        """The results of some of PARTS, by name. UserError: a run failed, its own message is given; or a peer is not
        installed."""
        if self.datatrove:
            check_datatrove()
        measure = {
            "signatures": self.signatures,
            "bands": self.bands,
            "tokenize": self.tokenize,
            "dedup": self.dedup,
            "pipeline": self.pipeline,
            "linear": self.linear,
        }
        return {part: measure[part]() for part in parts}

    def signatures(self) -> Result:
        """MinHash signatures of documents from their text, against datasketch's update_batch on ready shingles."""
        count = max(1, min(1000, int(self.megabytes * 1e6 / DOCUMENT_BYTES)))
        texts = [sample.text.encode() for sample in itertools.islice(sample_documents(0, DOCUMENT_BYTES), count)]
        ours, theirs = _our_signatures(texts), _datasketch_signatures(texts)
        times = take_turns({"megagpt": ours, "datasketch": theirs}, self.repeats)
        rates = {name: count / statistics.median(seconds) for name, seconds in times.items()}
        same = _same_signatures(texts[:100])
        ratio = rates["megagpt"] / rates["datasketch"]
        self.report(
            f"signatures: {rates['megagpt']:,.0f} documents/s a core from the text, {ratio:.1f} x datasketch's "
            f"update_batch ({rates['datasketch']:,.0f}, ready shingles); {'the same' if same else 'OTHER'} signatures"
        )
        return {"documents": count, "documents_per_second": rates, "ratio": ratio, "same_signatures": same}

    def bands(self) -> Result:
        """Banding and clustering of short documents at 14 x 8: the stages between the signatures and the decisions."""
        corpus = self._corpus(self.megabytes, SHORT_DOCUMENT_BYTES)
        settings = {**_EXACT_AND_NEAR, "tokenizer": "bytes", "input": [f"{corpus}/*.jsonl"]}
        runs = [self._preprocess(settings, self.workers) for _ in range(self.repeats)]
        documents = runs[0]["documents"]
        seconds = [sum(run["stages"][stage] for stage in ("keys", "bands", "clusters")) for run in runs]
        rate = documents / statistics.median(seconds)
        self.report(f"bands: {rate:,.0f} documents/s banded and clustered by {self.workers} workers")
        return {"documents": documents, "seconds": seconds, "documents_per_second": rate}

    def tokenize(self) -> Result:
        """jsonl to .bin and .idx, nothing else, by both backends, against a plain loop over tiktoken's batches."""
        corpus = self._corpus(self.megabytes)
        contenders: dict[str, _RunOnce] = {}
        for workers, backend in itertools.product(self._worker_counts(), ("tiktoken", "gigatoken")):
            settings = {**_RAW, "dedup": {"method": "none"}, "input": [f"{corpus}/*.jsonl"]}
            contenders[f"{backend}, {workers} workers"] = partial(self._preprocess, settings, workers, backend)
        for threads in self._worker_counts():
            arguments = {"input": str(corpus), "output": str(self.folder), "threads": threads}
            contenders[f"plain loop, {threads} threads"] = partial(child, "corpus_runs", "plain_loop", arguments)
        return self._compare("tokenize", contenders, corpus, f"plain loop, {self.workers} threads")

    def dedup(self) -> Result:
        """Exact and near-duplicates alone (bytes for tokens), against datasketch's index in memory, and datatrove."""
        corpus = self._corpus(self.megabytes)
        settings = {**_EXACT_AND_NEAR, "tokenizer": "bytes", "input": [f"{corpus}/*.jsonl"]}
        contenders: dict[str, _RunOnce] = {
            f"megagpt, {workers} workers": partial(self._preprocess, settings, workers)
            for workers in self._worker_counts()
        }
        contenders["datasketch, 1 process"] = partial(child, "corpus_peers", "run_datasketch", {"input": str(corpus)})
        if self.datatrove:
            contenders[f"datatrove, {self.workers} workers"] = partial(self._datatrove, corpus, None)
        result = self._compare("dedup", contenders, corpus)
        ours = {"datasketch, 1 process": "megagpt, 1 workers", f"datatrove, {self.workers} workers": self._all_workers}
        return self._against(result, {theirs: ours[theirs] for theirs in ours if theirs in contenders})

    def pipeline(self) -> Result:
        """The whole pipeline: exact and near dedup and tokenization; the same with the default cleaning and filters."""
        corpus = self._corpus(self.megabytes)
        contenders: dict[str, _RunOnce] = {}
        for workers in self._worker_counts():
            raw: Result = {**_EXACT_AND_NEAR, "input": [f"{corpus}/*.jsonl"]}
            contenders[f"dedup, {workers} workers"] = partial(self._preprocess, raw, workers)
            clean = {"file": str(self.filter_config), "tokenizer": "gpt2", "input": [f"{corpus}/*.jsonl"]}
            contenders[f"clean, filter, dedup, {workers} workers"] = partial(self._preprocess, clean, workers)
        theirs = f"datatrove, {self.workers} workers"
        if self.datatrove:
            tokenizer = self.folder / "tokenizer.json"
            to_huggingface(load_tokenizer("gpt2")).save(str(tokenizer))
            contenders[theirs] = partial(self._datatrove, corpus, tokenizer)
        result = self._compare("pipeline", contenders, corpus)
        if self.workers > 1:
            for name in ("dedup", "clean, filter, dedup"):
                self._scale(result, name)
        return self._against(result, {theirs: f"dedup, {self.workers} workers"} if self.datatrove else {})

    def linear(self) -> Result:
        """Seconds of every stage, and the largest resident set of any process, of ever larger corpora in turns."""
        sizes = (*LINEAR_MEGABYTES, *([LARGE_MEGABYTES] if self.large else []))
        runs: list[list[Result]] = [[] for _ in sizes]
        for _, (size, found) in itertools.product(range(self.repeats), list(zip(sizes, runs, strict=True))):
            settings = {**_EXACT_AND_NEAR, "input": [f"{self._corpus(size)}/*.jsonl"]}
            found.append(self._preprocess(settings, self.workers))
        megabytes = [found[0]["text_bytes"] / 1e6 for found in runs]
        seconds = [statistics.median(run["seconds"] for run in found) for found in runs]
        ideal = min(second / size for second, size in zip(seconds, megabytes, strict=True))
        result: Result = {
            "workers": self.workers,
            "megabytes": megabytes,
            "seconds": seconds,
            "ideal_seconds": [ideal * size for size in megabytes],
            "all_seconds": [[run["seconds"] for run in found] for found in runs],
            "stage_seconds": {
                stage: [statistics.median(run["stages"].get(stage, 0.0) for run in found) for found in runs]
                for stage in runs[-1][0]["stages"]
            },
            "peak_bytes": [max(run["peak_bytes"] for run in found) for found in runs],
        }
        for size, second, peak in zip(megabytes, seconds, result["peak_bytes"], strict=True):
            self.report(
                f"linear: {size:,.1f} MB: {second:.2f} s, {second / size:.4f} s a MB, {second / size / ideal:.2f} x "
                f"ideal, largest process {peak / 1e6:,.0f} MB"
            )
        return result

    @property
    def _all_workers(self) -> str:
        return f"megagpt, {self.workers} workers"

    def _worker_counts(self) -> list[int]:
        return sorted({1, self.workers})

    def _corpus(self, megabytes: float, document_bytes: int = DOCUMENT_BYTES) -> Path:
        """A generated corpus with 5% exact and 5% edited copies, made once."""
        folder = self.folder / f"text_{megabytes:g}_{document_bytes}"
        if not folder.exists():
            write_sample_corpus(folder, int(megabytes * 1e6), document_bytes=document_bytes)
        return folder

    def _preprocess(self, settings: Result, workers: int, backend: str = "auto") -> Result:
        output = self.folder / "dataset"
        execution = {"workers": workers, "tokenizer_backend": backend}
        try:
            arguments = {**settings, "output": str(output), "execution": execution}
            result = child("corpus_runs", "run_preprocess", arguments)
        finally:
            shutil.rmtree(output, ignore_errors=True)
        result["stages"][OTHER] = result["seconds"] - sum(result["stages"].values())
        return result

    def _datatrove(self, corpus: Path, tokenizer: Path | None) -> Result:
        output = self.folder / "datatrove"
        arguments = {
            "input": str(corpus),
            "output": str(output),
            "workers": self.workers,
            "tokenizer": str(tokenizer) if tokenizer else None,
        }
        try:
            return child("corpus_peers", "run_datatrove", arguments)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _compare(self, part: str, contenders: dict[str, _RunOnce], corpus: Path, base: str | None = None) -> Result:
        """What each needed, taken in turns, by medians; `base`: the one that the rates of others are divided by."""
        runs: dict[str, list[Result]] = {name: [] for name in contenders}
        for _ in range(self.repeats):
            for name, run in contenders.items():
                runs[name].append(run())
        truth = json.loads((corpus / TRUTH_NAME).read_text(encoding="utf-8"))
        megabytes = truth["text_bytes"] / 1e6
        seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
        rates = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
        result: Result = {
            "megabytes": megabytes,
            "documents": truth["documents"],
            "megabytes_per_second": rates,
            "all_seconds": seconds,
            "stage_seconds": {
                name: {stage: statistics.median(run["stages"][stage] for run in found) for stage in found[0]["stages"]}
                for name, found in runs.items()
                if "stages" in found[0]
            },
            "peak_bytes": {name: max(run["peak_bytes"] for run in found) for name, found in runs.items()},
            "removed": {name: found[0]["removed"] for name, found in runs.items() if "removed" in found[0]},
        }
        if base:
            result["ratio"] = {name: rate / rates[base] for name, rate in rates.items()}
        for name, rate in rates.items():
            compared = f", {result['ratio'][name]:.2f} x the {base}" if base and name != base else ""
            removed = f", {result['removed'][name]:,} documents removed" if name in result["removed"] else ""
            peak = result["peak_bytes"][name] / 1e6
            self.report(f"{part}: {name}: {rate:.1f} MB/s{compared}, largest process {peak:,.0f} MB{removed}")
        return result

    def _scale(self, result: Result, name: str) -> None:
        """Add how many times as fast all workers are as one, and each stage of theirs."""
        one, many = f"{name}, 1 workers", f"{name}, {self.workers} workers"
        gain = ratio(result["all_seconds"][one], result["all_seconds"][many])["median"]
        stages = result["stage_seconds"]
        by_stage = {stage: stages[one][stage] / seconds for stage, seconds in stages[many].items() if seconds > 0}
        result.setdefault("scaling", {})[name] = gain
        result.setdefault("stage_scaling", {})[name] = by_stage
        self.report(f"pipeline: {name}: {self.workers} workers are {gain:.2f} x as fast as one")

    def _against(self, result: Result, pairs: dict[str, str]) -> Result:
        """Add, for each peer, how many times as fast our contender is, turn by turn."""
        result["speedup_over"] = {}
        for theirs, ours in pairs.items():
            found = ratio(result["all_seconds"][theirs], result["all_seconds"][ours])
            name = theirs.partition(",")[0]
            version = importlib.metadata.version(name)
            result["speedup_over"][name] = {"version": version, "contender": ours, **found}
            self.report(
                f"{ours}: {found['median']:.1f} x as fast as {name} {version} "
                f"(turn by turn {found['min']:.1f} to {found['max']:.1f})"
            )
        return result


def _our_signatures(texts: Sequence[bytes]) -> Callable[[], object]:
    from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
    from megagpt.corpus.minhash import signature

    return lambda: [signature(shingle_hashes(collapse_whitespace(text), SHINGLE_WORDS), NUM_PERM) for text in texts]


def _datasketch_signatures(texts: Sequence[bytes]) -> Callable[[], object]:
    from datasketch import MinHash

    documents = [shingles(text) for text in texts]

    def run() -> None:
        for document in documents:
            MinHash(NUM_PERM, scheme="affine32").update_batch(document)

    return run


def _same_signatures(texts: Sequence[bytes]) -> bool:
    """Whether datasketch, given the same hashes of shingles, has the same signatures."""
    from datasketch import MinHash

    from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
    from megagpt.corpus.minhash import signature

    for text in texts:
        hashes = shingle_hashes(collapse_whitespace(text), SHINGLE_WORDS)
        sketch = MinHash(NUM_PERM, scheme="affine32", hashfunc=lambda value: value)
        sketch.update_batch(hashes.tolist())
        if not np.array_equal(sketch.hashvalues, signature(hashes, NUM_PERM)):
            return False
    return True
