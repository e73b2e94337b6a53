"""How fast a corpus becomes a token dataset, on generated text (megagpt.corpus.sample_text).

Everything is measured several times, the contenders in turns (A B A B ...), so that whatever else the machine does
slows all of them; the medians count. Whole runs are `preprocess` in a process of its own, by the times of its report;
MB are 10^6 bytes of text.
"""

import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.corpus.sample_text import sample_documents, write_sample_corpus
from megagpt.errors import UserError

PARTS = ("signatures", "bands", "tokenize", "pipeline", "linear")
"""What can be measured, see the functions of these names."""

Result = dict[str, Any]
"""JSON types."""

DOCUMENT_BYTES, SHORT_DOCUMENT_BYTES = 8000, 400
NUM_PERM, SHINGLE_WORDS = 128, 5
LINEAR_MEGABYTES, LARGE_MEGABYTES = (10, 100), 1000
_SECONDS_BETWEEN_SAMPLES = 0.2
_BATCH = 1000  # documents that the plain loop holds
_RAW: Result = {"clean": {"enabled": False}, "tokenizer": "gpt2"}
_EXACT_AND_NEAR: Result = {**_RAW, "dedup": {"method": "minhash"}}
_RUN = "from megagpt.benchmark import corpus; corpus.{}()"


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
    report: Callable[[str], None]
    """Is given a line about each result."""

    def run(self, parts: Sequence[str]) -> Result:
        """The results of some of PARTS, by name. UserError: a run failed; its own message is given."""
        measure = {
            "signatures": self.signatures,
            "bands": self.bands,
            "tokenize": self.tokenize,
            "pipeline": self.pipeline,
            "linear": self.linear,
        }
        return {part: measure[part]() for part in parts}

    def signatures(self) -> Result:
        """MinHash signatures of documents from their text, against datasketch's update_batch on ready shingles."""
        count = max(1, min(1000, int(self.megabytes * 1e6 / DOCUMENT_BYTES)))
        texts = [sample.text.encode() for sample in itertools.islice(sample_documents(0, DOCUMENT_BYTES), count)]
        ours, theirs = _our_signatures(texts), _datasketch_signatures(texts)
        times = self._take_turns({"megagpt": ours, "datasketch": theirs})
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
        documents = runs[0]["counts"]["documents"]
        seconds = [sum(run["stages"][stage] for stage in ("keys", "bands", "clusters")) for run in runs]
        rate = documents / statistics.median(seconds)
        self.report(f"bands: {rate:,.0f} documents/s banded and clustered by {self.workers} workers")
        return {"documents": documents, "seconds": seconds, "documents_per_second": rate}

    def tokenize(self) -> Result:
        """jsonl to .bin and .idx, nothing else, by both backends, against a plain loop over tiktoken's batches."""
        corpus = self._corpus(self.megabytes)
        contenders: dict[str, Callable[[], float]] = {}
        for workers, backend in itertools.product(self._worker_counts(), ("tiktoken", "gigatoken")):
            settings = {**_RAW, "dedup": {"method": "none"}, "input": [f"{corpus}/*.jsonl"]}
            contenders[f"{backend}, {workers} workers"] = self._timed(settings, workers, backend)
        for threads in self._worker_counts():
            contenders[f"plain loop, {threads} threads"] = self._timed_plain_loop(corpus, threads)
        return self._rates("tokenize", contenders, f"plain loop, {self.workers} threads")

    def pipeline(self) -> Result:
        """The whole pipeline: exact and near dedup and tokenization; the same with the default cleaning and filters."""
        corpus = self._corpus(self.megabytes)
        contenders: dict[str, Callable[[], float]] = {}
        for workers in self._worker_counts():
            raw: Result = {**_EXACT_AND_NEAR, "input": [f"{corpus}/*.jsonl"]}
            contenders[f"dedup, {workers} workers"] = self._timed(raw, workers)
            clean = {"file": str(self.filter_config), "tokenizer": "gpt2", "input": [f"{corpus}/*.jsonl"]}
            contenders[f"clean, filter, dedup, {workers} workers"] = self._timed(clean, workers)
        result = self._rates("pipeline", contenders)
        if self.workers > 1:
            rates = result["megabytes_per_second"]
            for name in ("dedup", "clean, filter, dedup"):
                ratio = rates[f"{name}, {self.workers} workers"] / rates[f"{name}, 1 workers"]
                result.setdefault("scaling", {})[name] = ratio
                self.report(f"pipeline: {name}: {self.workers} workers are {ratio:.2f} x as fast as one")
        return result

    def linear(self) -> Result:
        """Seconds a MB, and the largest resident set of any process, of ever larger corpora."""
        result: Result = {}
        for megabytes in (*LINEAR_MEGABYTES, *([LARGE_MEGABYTES] if self.large else [])):
            corpus = self._corpus(megabytes)
            run = self._preprocess({**_EXACT_AND_NEAR, "input": [f"{corpus}/*.jsonl"]}, self.workers)
            seconds, peak = run["seconds"] / (run["counts"]["text_bytes"] / 1e6), run["peak_bytes"]
            result[str(megabytes)] = {"seconds_per_megabyte": seconds, "peak_bytes": peak}
            self.report(f"linear: {megabytes:,} MB: {seconds:.4f} s a MB, largest process {peak / 1e6:,.0f} MB")
            shutil.rmtree(corpus)
        return result

    def _worker_counts(self) -> list[int]:
        return sorted({1, self.workers})

    def _corpus(self, megabytes: float, document_bytes: int = DOCUMENT_BYTES) -> Path:
        """A generated corpus with 5% exact and 5% edited copies, made once."""
        folder = self.folder / f"text_{megabytes:g}_{document_bytes}"
        if not folder.exists():
            write_sample_corpus(folder, int(megabytes * 1e6), document_bytes=document_bytes)
        return folder

    def _timed(self, settings: Result, workers: int, backend: str = "auto") -> Callable[[], float]:
        """A run that returns the MB/s of text."""

        def run() -> float:
            result = self._preprocess(settings, workers, backend)
            return result["counts"]["text_bytes"] / 1e6 / result["seconds"]

        return run

    def _timed_plain_loop(self, corpus: Path, threads: int) -> Callable[[], float]:
        def run() -> float:
            arguments = {"input": str(corpus), "output": str(self.folder), "threads": threads}
            return _child("plain_loop", arguments)["megabytes_per_second"]

        return run

    def _preprocess(self, settings: Result, workers: int, backend: str = "auto") -> Result:
        output = self.folder / "dataset"
        execution = {"workers": workers, "tokenizer_backend": backend}
        try:
            return _child("run_preprocess", {**settings, "output": str(output), "execution": execution})
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _take_turns(self, contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each run of each contender."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.repeats):
            for name, run in contenders.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        return times

    def _rates(self, part: str, contenders: dict[str, Callable[[], float]], base: str | None = None) -> Result:
        """The median MB/s of each, taken in turns; `base`: the one that the others are compared with."""
        measured: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.repeats):
            for name, run in contenders.items():
                measured[name].append(run())
        rates = {name: statistics.median(values) for name, values in measured.items()}
        result: Result = {"megabytes_per_second": rates, "all": measured}
        if base:
            result["ratio"] = {name: rate / rates[base] for name, rate in rates.items()}
        for name, rate in rates.items():
            compared = f", {result['ratio'][name]:.2f} x the {base}" if base and name != base else ""
            self.report(f"{part}: {name}: {rate:.1f} MB/s{compared}")
        return result


def _our_signatures(texts: Sequence[bytes]) -> Callable[[], object]:
    from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
    from megagpt.corpus.minhash import signature

    return lambda: [signature(shingle_hashes(collapse_whitespace(text), SHINGLE_WORDS), NUM_PERM) for text in texts]


def _datasketch_signatures(texts: Sequence[bytes]) -> Callable[[], object]:
    from datasketch import MinHash

    shingles = [_shingles(text) for text in texts]

    def run() -> None:
        for document in shingles:
            MinHash(NUM_PERM, scheme="affine32").update_batch(document)

    return run


def _shingles(text: bytes) -> list[bytes]:
    words = text.split()
    return [b" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]


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


# In processes of their own


def _child(function: str, arguments: Result) -> Result:
    """What a function below prints in a process of its own, and `peak_bytes`, the largest resident set of it or any
    process that it started, as seen five times a second. UserError: it failed."""
    try:
        import psutil
    except ImportError as error:
        raise UserError(f"{error}; install it with pip install 'megagpt[dev]'") from error
    peak = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(function)], stdin=subprocess.PIPE, stdout=output, stderr=errors
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(arguments).encode())
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended in this moment
                    tree = psutil.Process(process.pid)
                    for member in (tree, *tree.children(recursive=True)):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            peak = max(peak, member.memory_info().rss)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS_BETWEEN_SAMPLES)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"the measured run failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
        return {**json.loads(output.read()), "peak_bytes": peak}


def run_preprocess() -> None:
    """Run `preprocess` with the settings on standard input, over those of the configuration `file` in them, if there is
    one; print its times and counts."""
    from megagpt.config.loading import load_section
    from megagpt.corpus import CorpusConfig, preprocess

    settings = json.load(sys.stdin)
    config = load_section(CorpusConfig, settings.pop("file", None), list(settings.items()))
    report = preprocess(config)
    stages = {stage.name: stage.seconds for stage in report.stages}
    print(json.dumps({"seconds": report.seconds, "stages": stages, "counts": report.counts, "tokens": report.tokens}))


def plain_loop() -> None:
    """What a careful user writes without this project: tiktoken's batches on threads, ids and lengths into files."""
    from megagpt.tokenizer import load_tokenizer

    arguments = json.load(sys.stdin)
    encoding = load_tokenizer("gpt2").encoding
    text_bytes = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments["output"]) as folder:
        with open(Path(folder) / "tokens.bin", "wb") as tokens, open(Path(folder) / "lengths.bin", "wb") as lengths:
            for path in sorted(Path(arguments["input"]).glob("*.jsonl")):
                with open(path, encoding="utf-8") as lines:
                    while batch := [json.loads(line)["text"] for line in itertools.islice(lines, _BATCH)]:
                        ids = encoding.encode_ordinary_batch(batch, num_threads=arguments["threads"])
                        for document in ids:
                            document.append(encoding.eot_token)
                            np.array(document, np.uint16).tofile(tokens)
                        np.array([len(document) for document in ids], np.int32).tofile(lengths)
                        text_bytes += sum(len(text.encode()) for text in batch)
        seconds = time.perf_counter() - started
    print(json.dumps({"megabytes_per_second": text_bytes / 1e6 / seconds}))
