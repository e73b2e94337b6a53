"""All measurements that docs/performance.md shows, as data, and the loop that runs them, one process after the other.

A measurement is a command line of tools.benchmark. Its result is FOLDER/NAME.json; one that is there, of the same
command, is not measured again.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megagpt.benchmark.figures import Figure, main_figures
from megagpt.benchmark.measurements import date_measured, read_figures
from megagpt.benchmark.targets import Target
from megagpt.errors import UserError

_SECONDS_TO_END = 60


@dataclass(frozen=True)
class Entry:
    """One measurement."""

    name: str
    title: str
    words: str
    """After `python -m tools.benchmark`."""
    nanogpt: bool = False
    """Whether nanoGPT takes part if there is a checkout of it."""
    targets: Mapping[str, Target] = field(default_factory=dict)
    """What figures shall be that the result does not judge, by their names (megagpt.benchmark.figures)."""

    def arguments(self, nanogpt: Path | None = None) -> list[str]:
        """The words, with nanoGPT's model.py if that is given and takes part."""
        return [*shlex.split(self.words), *(["--nanogpt", str(nanogpt)] if nanogpt and self.nanogpt else [])]


_SMALL_STEP = {
    "speedup over nanogpt, compiled": Target(1.3, "x", at_least=True),
    "speedup over nanogpt": Target(4, "x", at_least=True),
}
_SAMPLING = {
    f"{model}, batch {rows}: speedup over transformers": Target(limit, "x", at_least=True)
    for model in ("small", "gpt2_124m")
    for rows, limit in ((1, 3), (8, 2))
}
_TWO_WORKERS = {
    "signatures, one core": Target(6000, "documents/s", at_least=True),
    "banding and clustering": Target(300_000, "documents/s", at_least=True),
    "tokenization: tiktoken, 2 workers": Target(24, "MB/s", at_least=True),
    "whole runs: dedup, 2 workers": Target(15, "MB/s", at_least=True),
    "whole runs: clean, filter, dedup, 2 workers": Target(8, "MB/s", at_least=True),
    "whole runs: dedup, over 1 worker": Target(1.8, "x", at_least=True),
    "whole runs: clean, filter, dedup, over 1 worker": Target(1.8, "x", at_least=True),
}
_ONE_ROW = "train.global_batch_size=1 train.micro_batch_size=1"
_LEVERS = "--against train.compile=false --against model.vocab_multiple_of=128 --against parallel.zero_stage=0"
_GPU_124M = "train configs/gpt2_124m.yaml train.global_batch_size=32 train.micro_batch_size=32"
_CHECKPOINTED = "train.activation_checkpointing=true"
_GPU_STEP = {"speedup over plain": Target(1.2, "x", at_least=True), "MFU": Target(0.5, "%", at_least=True, scale=0.01)}
_GPU_MFU = {"MFU": Target(0.55, "%", at_least=True, scale=0.01)}

CPU = (
    Entry("train_small", "Training step, small model", "train configs/small.yaml --steps 6 --transformers",
          nanogpt=True, targets=_SMALL_STEP),
    Entry("train_ranks", "Training step, small model, two ranks", "train configs/small.yaml --ranks 2 --steps 4",
          nanogpt=True, targets=_SMALL_STEP),
    Entry("train_gpt2_124m", "Training step, GPT-2 124M", f"train configs/gpt2_124m.yaml {_ONE_ROW} --steps 5 "
          "--transformers", nanogpt=True, targets=_SMALL_STEP),
    Entry("train_llama_150m", "Training step, Llama 150M", f"train configs/llama_150m.yaml {_ONE_ROW} --steps 5 "
          "--transformers"),
    Entry("loss", "Output head and loss, GPT-2 124M", "loss configs/gpt2_124m.yaml --tokens 1024"),
    Entry("start", "Time to the first step", "start configs/small.yaml"),
    Entry("growth", "Growth of a training step", "growth configs/small.yaml train.global_batch_size=8 --steps 3"),
    Entry("generate", "Sampling", "generate --rows 1,8 --repeats 3", nanogpt=True, targets=_SAMPLING),
    Entry("corpus", "From text to tokens", "corpus --parts signatures,bands,tokenize,pipeline,linear "
          "--megabytes 100 --workers 2 --repeats 2 --large", targets=_TWO_WORKERS),
    Entry("corpus_peers", "Duplicates beside datasketch and datatrove",
          "corpus --parts dedup --megabytes 20 --workers 2 --repeats 2 --datatrove"),
    Entry("data", "Reading datasets", "data"),
    Entry("checkpoint", "Checkpoints", "checkpoint"),
)  # fmt: skip
"""What a machine without a GPU measures."""

GPU = (
    Entry("gpu_train_124m", "Training step on a GPU, GPT-2 124M", f"{_GPU_124M} --steps 20 --unfused {_LEVERS}",
          nanogpt=True, targets=_GPU_STEP),
    Entry("gpu_attention", "Kernels of attention on a GPU, GPT-2 124M", f"{_GPU_124M} --steps 20 "
          "--against train.attention_kernel=flash --against train.attention_kernel=cudnn "
          "--against train.attention_kernel=efficient"),
    Entry("gpu_compile_model", "The whole model compiled as one on a GPU, GPT-2 124M", f"{_GPU_124M} --steps 20 "
          "--against train.compile_scope=model"),
    Entry("gpu_checkpointing", "Activation checkpointing on a GPU, GPT-2 124M", f"{_GPU_124M} --steps 20 "
          f"--against {_CHECKPOINTED} --against '{_CHECKPOINTED} train.activation_checkpointing_every=2' "
          f"--against '{_CHECKPOINTED} train.activation_checkpointing_every=4'"),
    Entry("gpu_loss", "Output head and loss on a GPU, GPT-2 124M", "loss configs/gpt2_124m.yaml --tokens 32768 "
          "--repeats 20"),
    Entry("gpu_train_1_3b", "Training step on a GPU, GPT-3 1.3B", "train configs/gpt3_1.3b.yaml "
          "train.global_batch_size=4 train.micro_batch_size=4 --steps 10", targets=_GPU_MFU),
    Entry("gpu_train_8b", "Training step on a GPU, as many layers of Llama 8B as fit", "train configs/llama_8b.yaml "
          "data.seq_len=4096 train.global_batch_size=2 train.micro_batch_size=2 --steps 10 --fit-layers",
          targets=_GPU_MFU),
    Entry("gpu_generate", "Sampling on a GPU", "generate --rows 1,8,64", nanogpt=True),
    Entry("gpu_data", "Reading datasets on a GPU's machine", "data"),
    Entry("gpu_checkpoint", "Checkpoints on a GPU's machine", "checkpoint"),
)  # fmt: skip
"""What a machine with a GPU measures, on one."""


def run_suite(
    entries: Sequence[Entry], folder: Path, nanogpt: Path | None, fresh: bool, report: Callable[[str], None]
) -> list[str]:
    """Measure what `folder` lacks, or with `fresh` everything; the names of those that failed.

    Standard output of a measurement is this process's; its errors are in FOLDER/NAME.log if it fails. An exception on
    the way (an interrupt, say) ends the measurement that is going on.
    """
    failed = []
    for number, entry in enumerate(entries, 1):
        output, place = folder / f"{entry.name}.json", f"[{number}/{len(entries)}] {entry.name}"
        arguments = entry.arguments(nanogpt)
        if not fresh and (date := date_measured(output, arguments)):
            report(f"{place}: kept, measured {date}")
            continue
        report(f"{place}: tools.benchmark {shlex.join(arguments)}")
        if problem := _measure(arguments, output):
            report(f"{place}: FAILED: {problem}")
            failed.append(entry.name)
    return failed


def summary(entries: Sequence[Entry], folder: Path) -> list[Figure]:
    """The figures with targets of each measurement that is there, or its first figure, by the measurement's name."""
    found = []
    for entry in entries:
        figures = main_figures(read_figures(folder / f"{entry.name}.json", entry.targets))
        found += [replace(figure, name=f"{entry.name}: {figure.name}") for figure in figures]
    return found


def _measure(arguments: Sequence[str], output: Path) -> str | None:
    """None, or in a line why it failed."""
    log = output.with_suffix(".log")
    command = [sys.executable, "-u", "-m", "tools.benchmark", *arguments, "--output", str(output)]
    try:
        with open(log, "wb") as errors:
            # A session of its own: an interrupt at the terminal is for this process, which then ends that one.
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
    except OSError as error:
        raise UserError(f"{log}: cannot be written: {error.strerror}") from error
    try:
        code = process.wait()
    except BaseException:  # an interrupt: nobody will ask why the measurement did not end
        log.unlink()
        raise
    finally:
        _end(process)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    if code == 0:
        log.unlink()
        return None
    said = [line for line in lines if line.strip()]
    return f"{said[-1].removeprefix('error: ') if said else f'exit code {code}'}; see {log}"


def _end(process: "subprocess.Popen[Any]") -> None:
    """Ask it to end, then make it and all that it started."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
