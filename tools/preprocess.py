"""Make a token dataset from text, in files of many kinds: read, clean, deduplicate, tokenize, shuffle, split.

What it does lives in megagpt.corpus; here are the flags, the display and the start under MPI.
"""

import contextlib
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

if __name__ == "__main__":
    from tools.interrupt import end_at_once_on_interrupt

    end_at_once_on_interrupt()

import typer
from rich.console import Console

from megagpt.config.loading import load_section
from megagpt.corpus import CorpusConfig, Report, preprocess
from megagpt.corpus.display import display
from megagpt.corpus.estimate import Estimate
from megagpt.corpus.estimate import estimate as corpus_estimate
from megagpt.corpus.executor import Pool, mpi_pool
from megagpt.corpus.output import REPORT_NAME
from megagpt.corpus.quarantine import QUARANTINE_NAME
from megagpt.corpus.report import TITLES
from megagpt.corpus.sources import Format, TextUnit, one_line
from megagpt.errors import UsageError, UserError
from tools.command import fail, run_command, single_command

NAME = "python -m tools.preprocess"
_SECONDS_TO_FORWARD = 1.0  # a launcher that is told to abort drops what it has not yet forwarded of our output
# What launchers tell each process about how many they started: MPICH and Slurm's PMI, Open MPI, srun.
_LAUNCHER_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class Dedup(str, Enum):
    """Choices of --dedup."""

    none = "none"
    exact = "exact"
    minhash = "minhash"


class Engine(str, Enum):
    """Choices of --executor."""

    local = "local"
    mpi = "mpi"


def preprocess_command(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="MORE", help="More inputs, as a shell expands a pattern to.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="File, folder, quoted pattern, @LIST or hf:NAME[:CONFIG][:SPLIT]; may be repeated."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the token dataset; appears when complete.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tiktoken encoding, bytes, or the file of an own tokenizer. [default: gpt2]")
    ] = None,
    vocab_dir: Annotated[
        str | None, typer.Option(envvar="MEGAGPT_VOCAB_DIR", help="Where to look for vocabulary files first.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of all options; flags override it.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: one a CPU]")] = None,
    executor: Annotated[
        Engine, typer.Option(help="Processes of this machine, or the ranks of an MPI program.")
    ] = Engine.local,
    clean: Annotated[bool | None, typer.Option("--clean/--no-clean", help="[default: clean]")] = None,
    filter: Annotated[bool | None, typer.Option("--filter/--no-filter", help="[default: no-filter]")] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Evaluation file to keep out; may be repeated.")
    ] = None,
    dedup: Annotated[Dedup | None, typer.Option(help="[default: minhash]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Similarity of near-duplicates, 0 to 1. [default: 0.8]")
    ] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Share of documents. [default: 0.01]")] = None,
    split: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SHARE", help="A further split, as test=0.01; may be repeated.")
    ] = None,
    shuffle: Annotated[
        bool | None, typer.Option("--shuffle/--no-shuffle", help="Order of documents. [default: shuffle]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of shuffle and split. [default: 0]")] = None,
    work_dir: Annotated[str | None, typer.Option(help="Intermediate files. [default: OUTPUT.work]")] = None,
    keep_work: Annotated[
        bool | None, typer.Option("--keep-work", help="Leave the intermediate files after success.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="|".join(get_args(Format)), help="What all inputs hold. [default: auto]")
    ] = None,
    text_unit: Annotated[
        str | None,
        typer.Option(metavar="|".join(get_args(TextUnit)), help="Document of a text file. [default: file]"),
    ] = None,
    max_document_mb: Annotated[
        float | None, typer.Option(help="MiB of a document in its file; more is unreadable. [default: 50]")
    ] = None,
    max_bad: Annotated[float | None, typer.Option(help="Share of unreadable documents. [default: 0.01]")] = None,
    text_key: Annotated[
        str | None, typer.Option(help="Key or column of the text in .jsonl, Parquet, Arrow. [default: text]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Make nothing; tell from a sample what it would take and give.")
    ] = False,
) -> None:
    """Turn text into a token dataset.

    Reads, by their names or as --format says: .jsonl, and .json with a record a line; .parquet, .arrow, .feather and
    folders that datasets saved; the main text of .html and of the pages of .warc; the texts of .wet; the articles of a
    wiki's dump, pages-articles*.xml; any other file as one document, or, with --text-unit, as one a line or paragraph.
    All but the columnar ones may be compressed (.gz, .zst, .bz2, .xz). HTML, WARC and wikis need the web extra: pip
    install 'megagpt[web]'.

    --input @LIST stands for the inputs that the file LIST names, one a line, without blank lines and those that begin
    with #. --input hf:NAME[:CONFIG][:SPLIT] streams a dataset from the Hugging Face hub: of its default configuration,
    and its split train, if no others are named.

    An interrupted run goes on where it stopped when the same command is given again.

    Example: python -m tools.preprocess --input 'corpus/*.jsonl' --output data/corpus --tokenizer gpt2 --workers 8

    On several nodes: mpiexec -n 64 python -m tools.preprocess --executor mpi --input ... (rank 0 gives out the work)
    """
    options: dict[str, Any] = {
        "input": [*(input or []), *(more or [])] or None,
        "output": output,
        "tokenizer": tokenizer,
        "text_key": text_key,
        "format": format,
        "text_unit": text_unit,
        "max_document_mb": max_document_mb,
        "clean.enabled": clean,
        "filter.enabled": filter,
        "decontaminate.files": decontaminate or None,
        "dedup.method": dedup.value if dedup else None,
        "dedup.threshold": threshold,
        "validation_fraction": validation_fraction,
        "splits": _named_shares(split) if split else None,
        "shuffle": shuffle,
        "seed": seed,
        "max_bad": max_bad,
        "execution.workers": workers,
        "execution.work_dir": work_dir,
        "execution.keep_work": keep_work,
        "execution.vocab_dir": vocab_dir,
    }
    overrides = [(key, value) for key, value in options.items() if value is not None]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, _terminate)
    run = _estimate if estimate else functools.partial(_run, overwrite=overwrite)
    if executor is Engine.local:
        run(load_section(CorpusConfig, config, overrides), None)
        return
    with mpi_pool(_launched_processes()) as pool:
        if pool is not None:
            with _ending_all_ranks():
                run(load_section(CorpusConfig, config, overrides), pool)


def _named_shares(options: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for option in options:
        name, _, share = option.partition("=")
        try:
            value = float(share)
        except ValueError:
            raise UsageError(f"--split {option}: give a name and a share of the documents, as test=0.01") from None
        if name in shares:
            raise UsageError(f"--split {option}: {name} has a share of {shares[name]} already; give each name once")
        shares[name] = value
    return shares


class _TerminatedError(UserError):
    """Raised where the program is when it is asked to end, so that it ends its workers."""

    def __init__(self, number: int) -> None:
        super().__init__("terminated; run the same command again to go on")
        self.exit_code = 128 + number


def _terminate(number: int, _: object) -> NoReturn:
    raise _TerminatedError(number)


def _launched_processes() -> int:
    return max(int(os.environ.get(variable, 0)) for variable in _LAUNCHER_VARIABLES)


@contextlib.contextmanager
def _ending_all_ranks() -> Iterator[None]:
    """The other ranks may be in the middle of long work: an error here must not wait for them."""
    try:
        yield
    except UserError as error:
        _abort(fail(str(error), error.exit_code))
    except BaseException:  # noqa: BLE001 (nothing goes on after this)
        traceback.print_exc()
        _abort(1)


def _abort(code: int) -> NoReturn:
    from mpi4py import MPI

    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_SECONDS_TO_FORWARD)
    MPI.COMM_WORLD.Abort(code)
    raise SystemExit(code)


def _run(config: CorpusConfig, pool: Pool | None, overwrite: bool) -> None:
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    with display(console) as observe:
        report = preprocess(config, pool, observe, overwrite)
    _print_summary(console, report)


def _estimate(config: CorpusConfig, pool: Pool | None) -> None:
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    with display(console) as observe:
        found = corpus_estimate(config, pool, observe)
    _print_estimate(console, found)


def _print_estimate(console: Console, found: Estimate) -> None:
    total = sum(found.seconds.values())
    times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in found.seconds.items())
    tokens = f"{found.most_tokens:,}"
    if found.least_tokens < found.most_tokens:
        tokens = f"{found.least_tokens:,} to {tokens}"
    duplicates = f"{found.least_duplicates:.1%}"
    if found.most_duplicates > found.least_duplicates:
        duplicates += f" (copies are neighbours) to {found.most_duplicates:.1%} (copies are anywhere)"
    rows = [
        ("input", f"{found.input_bytes / 1e6:,.1f} MB in {found.files:,} files, about {found.documents:,} documents"),
        ("read for this estimate", f"{found.share:.2%} in {_duration(found.sample_seconds)}"),
        *((f"removed: {stage}", f"{share:.1%} of documents") for stage, share in found.removed.items() if share),
        ("duplicates", f"{duplicates} of the rest"),
        ("tokens", tokens),
        ("time", f"{_duration(total)} with {found.workers} workers ({times})"),
        ("work folder", f"{found.work_bytes / 1e6:,.1f} MB while it runs"),
        ("dataset", f"{found.output_bytes / 1e6:,.1f} MB at most"),
    ]
    for name, value in rows:
        console.print(f"{name:<24}{value}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _print_summary(console: Console, report: Report) -> None:
    output = one_line(report.output)
    if report.was_finished:
        console.print(f"{output}: already finished by an earlier run of the same plan; nothing to do")
    for name, count in report.funnel:
        console.print(f"{name:<32}{count:>14,}")
        for removal in report.removed if name == f"removed: {TITLES['filter']}" else []:
            if removal.stage == "filter":
                console.print(f"{removal.documents:>14,} {removal.reason}")
    for name, split in report.splits.items():
        console.print(f"{name:<32}{split.documents:>14,} documents {split.tokens:>16,} tokens")
    if report.counts["bad"] or report.counts["harmless"]:
        console.print(
            f"left out: {report.counts['bad']:,} unreadable, {report.counts['harmless']:,} empty or no text: see "
            f"{QUARANTINE_NAME} in {output}"
        )
    if not report.was_finished:
        speed = report.megabytes_per_second
        rate = "with results of an earlier run" if speed is None else f"{speed:.1f} MB/s of input"
        times = ", ".join(f"{stage.name} {stage.seconds:.1f}" for stage in report.stages)
        console.print(f"{report.seconds:.1f} s, {rate} (seconds: {times})")
        console.print(f"written: {output}; what happened to the documents: {REPORT_NAME} in it")


app = single_command(preprocess_command, NAME)

if __name__ == "__main__":
    run_command(app, NAME)
