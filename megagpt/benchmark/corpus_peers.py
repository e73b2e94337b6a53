"""The peers of the corpus benchmark, used as their own documentation shows it: datatrove and datasketch, from PyPI.

datatrove: the four steps of MinHash deduplication with its defaults (14 buckets of 8 hashes, runs of 5 words), then
either the documents that stay as jsonl, or its tokenizer and merger, which write one shuffled file of tokens. Its words
are spaCy's, in lower case and without punctuation, and nothing verifies its candidates, so that it removes other
documents than this project does, by a few. Its hashes are SHA-1, the other of its two choices: the default, xxHash, is
called in a way that xxhash 4 refuses. datasketch: one process, with all sketches in memory.
"""

import importlib
import importlib.metadata
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt.benchmark.corpus_runs import Result
from megagpt.errors import UserError

NUM_PERM, SHINGLE_WORDS, BANDS, ROWS = 128, 5, 14, 8


def check_datatrove() -> None:
    """Raise UserError where datatrove, or spaCy, whose words it hashes, is not installed."""
    try:
        for name in ("datatrove", "spacy"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}; install it with pip install 'megagpt[benchmark]', or do not compare with it"
        ) from error


def run_datatrove() -> None:
    """Deduplicate the .jsonl files of `input` into the empty folder `output` with `workers` processes.

    tokenizer: a tokenizer.json whose ids are written; None: jsonl is. Prints seconds, those of each step, and how many
    documents were removed.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    arguments = json.load(sys.stdin)
    workers, output = arguments["workers"], Path(arguments["output"])
    folders = {name: str(output / name) for name in ("signatures", "buckets", "removed", "unmerged", "tokens")}
    reader = JsonlReader(arguments["input"], glob_pattern="*.jsonl")
    files = len(list(Path(arguments["input"]).glob("*.jsonl")))
    config = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(hash_fc="sha1"))
    result: Result = {"stages": {}}
    kept = [reader, MinhashDedupFilter(folders["removed"])]
    if arguments["tokenizer"]:
        end = {"eos_token": "<|endoftext|>", "seed": 0}
        last = {
            "tokenize": ([*kept, DocumentTokenizer(folders["unmerged"], arguments["tokenizer"], **end)], files),
            "merge": ([DocumentTokenizerMerger(folders["unmerged"], folders["tokens"], "tokens", seed=0)], 1),
        }
    else:
        last = {"filter": ([*kept, JsonlWriter(str(output / "kept"), compression=None)], files)}
    steps = {
        "signatures": ([reader, MinhashDedupSignature(folders["signatures"], config)], files),
        "buckets": ([MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=config)], BANDS),
        "clusters": ([MinhashDedupCluster(folders["buckets"], folders["removed"], config)], 1),
        **last,
    }
    started = time.perf_counter()
    for name, (pipeline, tasks) in steps.items():
        began = time.perf_counter()
        logs = str(output / "logs" / name)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs).run()
        result["stages"][name] = time.perf_counter() - began
    result["seconds"] = time.perf_counter() - started
    number = struct.calcsize("<I")
    result["removed"] = sum(path.stat().st_size // number for path in Path(folders["removed"]).glob("*.remove"))
    print(json.dumps(result))


def run_datasketch() -> None:
    """Count the documents of the .jsonl files of `input` that resemble an earlier one by datasketch's MinHashLSH.

    Prints seconds, and how many documents resemble an earlier one.
    """
    from datasketch import MinHash, MinHashLSH

    folder = Path(json.load(sys.stdin)["input"])
    started = time.perf_counter()
    index = MinHashLSH(num_perm=NUM_PERM, params=(BANDS, ROWS))
    removed = 0
    for number, text in enumerate(_texts(folder)):
        sketch = MinHash(NUM_PERM)
        sketch.update_batch(shingles(text.encode()))
        if index.query(sketch):
            removed += 1
        index.insert(number, sketch)
    print(json.dumps({"seconds": time.perf_counter() - started, "removed": removed}))


def shingles(text: bytes) -> list[bytes]:
    """The runs of 5 words, which end at ASCII whitespace; a shorter text is one run."""
    words = text.split()
    return [b" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
