"""The measured runs of the corpus benchmark, each in a process of its own: time from within, memory from outside.

A run reads its arguments from standard input and prints its result, both in JSON; times begin after imports.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import UserError

Result = dict[str, Any]
"""JSON types."""

_SECONDS_BETWEEN_SAMPLES = 0.2
_BATCH = 1000  # documents that the plain loop holds
_RUN = "from megagpt.benchmark import {0}; {0}.{1}()"


def child(module: str, function: str, arguments: Result) -> Result:
    """What a function of a module beside this one prints in a process of its own, and `peak_bytes`, the largest
    resident set of it or any process that it started, as seen five times a second. UserError: it failed."""
    try:
        import psutil
    except ImportError as error:
        raise UserError(f"{error}; install it with pip install 'megagpt[dev]'") from error
    peak = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(module, function)], stdin=subprocess.PIPE, stdout=output, stderr=errors
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
    counts = report.counts
    result = {"seconds": report.seconds, "stages": stages, "documents": counts["documents"]}
    result |= {"text_bytes": counts["text_bytes"], "removed": counts["removed_exact"] + counts["removed_near"]}
    print(json.dumps(result))


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
    print(json.dumps({"seconds": seconds, "text_bytes": text_bytes}))
