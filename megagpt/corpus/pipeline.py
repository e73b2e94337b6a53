"""From text files to a token dataset: the stages of a run, one after another.

    extract ─▶ exact ─▶ keys ─▶ bands ─▶ clusters ─▶ select ─▶ tokenize ─▶ write

Each stage is a list of tasks that know nothing of each other; their results lie in the work folder, named by the
plan, from where an interrupted run goes on. A task works on a part of the corpus of a bounded size, or on a stretch of
sorted files, in bounded memory. The dataset appears when all is done, by one rename.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.corpus.clusters import ClustersTask
from megagpt.corpus.config import TRAIN, CorpusConfig
from megagpt.corpus.documents import Documents
from megagpt.corpus.exact import ExactTask, KeyRange
from megagpt.corpus.executor import LocalPool, Observer, Pool, Progress, StageResult, Task, run_stage
from megagpt.corpus.extract import ExtractTask
from megagpt.corpus.hashing import UInt64
from megagpt.corpus.near import BandTask, KeysTask
from megagpt.corpus.output import (
    REPORT_NAME,
    check_replaceable,
    finished,
    publishing,
    reserved,
    run_folders,
    write_sources,
)
from megagpt.corpus.plan import Plan, make_plan
from megagpt.corpus.quarantine import QUARANTINE_NAME, check_bad_ratio, write_quarantine
from megagpt.corpus.reasons import REASONS, STAGES
from megagpt.corpus.removed import write_removed
from megagpt.corpus.report import Report, StageTime, render_html
from megagpt.corpus.screening import Screening
from megagpt.corpus.select import SelectTask, kept_draws
from megagpt.corpus.sources import one_line
from megagpt.corpus.splits import nominal_bounds, settled_bounds
from megagpt.corpus.tokenize import TokenizeTask
from megagpt.corpus.workspace import disk_error, open_workspace
from megagpt.corpus.write import WriteTask, join, write_tasks
from megagpt.data.indexed import token_dtype
from megagpt.data.manifest import FileChecksum, Manifest, SplitInfo, TokenizerInfo
from megagpt.data.origins import SOURCES_NAME
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import DocumentEncoder
from megagpt.tokenizer.ranks import write_rank_file


def preprocess(
    config: CorpusConfig, pool: Pool | None = None, observe: Observer = lambda _: None, overwrite: bool = False
) -> Report:
    """Make the token dataset `config.output`.

    Args:
        config: what to make of what.
        pool: who does the work; None: `config.execution.workers` processes of this machine, which import the calling
            script anew, so that it needs the usual `if __name__ == "__main__":`.
        observe: called with the progress of the stages.
        overwrite: replace an existing dataset; otherwise one of the same plan is left as it is, another is an error.

    Raises:
        UserError: the input, the output folder, a worker or the disk do not allow it; what is done stays in the work
            folder, and the next call goes on from there.
    """
    start = time.monotonic()
    output, work_dir = run_folders(config)
    tokenizer = load_tokenizer(config.tokenizer, config.execution.vocab_dir)
    if config.execution.tokenizer_backend == "gigatoken":
        DocumentEncoder(tokenizer, "gigatoken")  # an error now, and not in a worker later
    plan = make_plan(config, tokenizer, written=(output, work_dir))
    if not overwrite and (manifest := finished(output, plan.hash)):
        counts = manifest.counts
        check_bad_ratio(output / QUARANTINE_NAME, counts["bad"], counts["documents"], config.max_bad)
        return Report(Path(config.output), counts, manifest.splits, seconds=time.monotonic() - start)
    workers = min(config.execution.workers or len(os.sched_getaffinity(0)), len(plan.chunks))
    with contextlib.ExitStack() as stack:
        stack.enter_context(reserved(output))
        check_replaceable(output, overwrite)
        folder = stack.enter_context(open_workspace(work_dir / f"{plan.hash[:16]}-{plan.chunk_bytes}"))
        run = _Run(config, plan, tokenizer, folder, pool or stack.enter_context(LocalPool(workers)), observe)
        report = run.make(output, overwrite, start)
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # other runs' folders are in it
        work_dir.rmdir()
    return report


class _Run:
    """One run; `make` is its life from top to bottom."""

    def __init__(
        self, config: CorpusConfig, plan: Plan, tokenizer: Tokenizer, folder: Path, pool: Pool, observe: Observer
    ) -> None:
        self.config, self.plan, self.tokenizer = config, plan, tokenizer
        self.folder, self.pool, self.observe = folder, pool, observe
        self.dtype = token_dtype(tokenizer.vocab_size).str
        self.split_names = [TRAIN, *config.shares]
        self.times: list[StageTime] = []

    def make(self, output: Path, overwrite: bool, start: float) -> Report:
        """Make the dataset and publish it as `output`; `start` is when the run began, in time.monotonic's seconds."""
        extract = self._extract()
        quarantine = self.folder / QUARANTINE_NAME
        bad = self._quarantine(quarantine, extract.folders)
        check_bad_ratio(quarantine, extract.total("bad"), extract.total("documents"), self.config.max_bad)
        documents = Documents.of(extract.folders)
        exact, clusters = self._find_duplicates(documents)
        select, bounds = self._select(documents, exact, clusters)
        tokenize = self._tokenize(documents, select, bounds)
        written = self._write(documents, tokenize)
        counts = self._counts(extract, select, tokenize)
        with publishing(output, self.plan.hash, overwrite) as aside:
            splits = self._join(aside, written)
            write_removed(aside / "removed.jsonl.zst", select.folders)
            write_sources(aside / SOURCES_NAME, self.plan.files)
            shutil.copyfile(quarantine, aside / QUARANTINE_NAME)
            report = Report(Path(self.config.output), counts, splits, self.times, time.monotonic() - start)
            self._describe(aside, report, bad)
        return report

    def _extract(self) -> StageResult:
        config = self.config
        screening = Screening(config.clean)
        tasks = [
            ExtractTask(chunk, config.text_key, config.max_document_bytes, screening, config.dedup)
            for chunk in self.plan.chunks
        ]
        return self._stage("extract", tasks)

    def _quarantine(self, path: Path, chunks: list[Path]) -> dict[str, int]:
        """Write the list of what could not be read; return the number of records by reason."""
        try:
            return write_quarantine(path, chunks, self.plan.files)
        except OSError as error:
            raise UserError(f"work folder {one_line(self.folder)}: {disk_error(error, self.folder)}") from error

    def _find_duplicates(self, documents: Documents) -> tuple[list[Path], list[Path]]:
        """The results of the stages `exact` and `clusters`."""
        dedup = self.config.dedup
        if dedup.method == "none":
            return [], []
        ranges = KeyRange.split(len(documents))
        exact = self._stage("exact", [ExactTask(documents, keys) for keys in ranges]).folders
        if dedup.method == "exact":
            return exact, []
        keys = self._stage("keys", [KeysTask(part, exact, dedup) for part in documents.parts]).folders
        tasks = [BandTask(documents, keys, band, part, dedup) for band in range(dedup.banding[0]) for part in ranges]
        bands = self._stage("bands", tasks).folders
        return exact, self._stage("clusters", [ClustersTask([*exact, *bands])]).folders

    def _select(self, documents: Documents, exact: list[Path], clusters: list[Path]) -> tuple[StageResult, list[int]]:
        """Decide about every document; also the bounds of the splits. UserError: no document is left."""
        config = self.config
        bounds = nominal_bounds(config.shares)
        names = [{piece.file_index: piece.file.name for piece in chunk.pieces} for chunk in self.plan.chunks]
        tasks = [
            SelectTask(documents, part, names[part.chunk], exact, clusters, config.dedup, bounds, config.seed)
            for part in documents.parts
        ]
        select = self._stage("select", tasks)
        if not select.total("kept"):
            raise UserError("no document is left to write; check the input, --text-key and the filters")
        counts = [select.total(f"split {split}") for split in range(len(self.split_names))]

        def drawn() -> Iterator[UInt64]:
            for part, folder in zip(documents.parts, select.folders, strict=True):
                yield kept_draws(part, folder, config.seed)

        return select, settled_bounds(bounds, counts, drawn)

    def _tokenize(self, documents: Documents, select: StageResult, bounds: list[int]) -> StageResult:
        config = self.config
        tasks = [
            TokenizeTask(
                part=part,
                select=folder,
                bounds=bounds,
                tokenizer=config.tokenizer,
                vocab_sha256=self.tokenizer.vocab_sha256,
                dtype=self.dtype,
                vocab_dir=config.execution.vocab_dir,
                backend=config.execution.tokenizer_backend,
                shuffle=config.shuffle,
                seed=config.seed,
            )
            for part, folder in zip(documents.parts, select.folders, strict=True)
        ]
        return self._stage("tokenize", tasks)

    def _write(self, documents: Documents, tokenize: StageResult) -> dict[str, list[Path]]:
        """Bring the documents of each split into their order: the results of the stage `write` by split."""
        tasks: list[WriteTask] = []
        ends = []
        for split in range(len(self.split_names)):
            tokens = [int(receipt.get(f"tokens {split}", 0)) for receipt in tokenize.receipts]
            if any(tokens):
                tasks += write_tasks(documents, tokenize.folders, split, tokens, self.config.shuffle, self.dtype)
            ends.append(len(tasks))
        folders = self._stage("write", tasks).folders
        return {
            name: folders[begin:end]
            for name, begin, end in zip(self.split_names, [0, *ends], ends, strict=False)
            if begin < end
        }

    def _stage(self, name: str, tasks: Sequence[Task]) -> StageResult:
        start = time.monotonic()
        result = run_stage(self.pool, self.folder / name, tasks, self.observe)
        self.times.append(StageTime(name, len(tasks), result.reused, time.monotonic() - start))
        return result

    def _counts(self, extract: StageResult, select: StageResult, tokenize: StageResult) -> dict[str, int]:
        """Documents and bytes by what became of them."""
        removed = {
            stage: sum(
                result.total(f"removed {reason.key}")
                for result in (extract, select)
                for reason in REASONS
                if reason.stage == stage
            )
            for stage in STAGES
        }
        return {
            "files": len(self.plan.files),
            "input_bytes": extract.total("bytes"),
            "bad": extract.total("bad"),
            "harmless": extract.total("harmless"),
            "documents": extract.total("documents"),
            "text_bytes": extract.total("text_bytes"),
            **{f"removed_{stage}": count for stage, count in removed.items()},
            "kept": select.total("kept"),
            "kept_text_bytes": tokenize.total("text_bytes"),
        }

    def _join(self, folder: Path, written: dict[str, list[Path]]) -> dict[str, SplitInfo]:
        """The files of every split that has documents."""
        start = time.monotonic()
        splits = {}
        for done, (name, results) in enumerate(written.items()):
            self.observe(Progress("join", len(written), done, 0, {}))
            splits[name] = join(folder / name, results, self.dtype)
        self.observe(Progress("join", len(written), len(written), 0, {}))
        self.times.append(StageTime("join", len(written), 0, time.monotonic() - start))
        return splits

    def _describe(self, folder: Path, report: Report, bad: dict[str, int]) -> None:
        """Write the manifest, the report and a copy of an own tokenizer."""
        tokenizer, plan = self.tokenizer, self.plan
        copy = None
        if tokenizer.path is not None:
            copy = f"tokenizer{tokenizer.path.suffix}"
            write_rank_file(tokenizer.ranks, folder / copy)  # and not what its file may have become meanwhile
        checksums = {path.name: FileChecksum.of(path) for path in sorted(folder.iterdir())}
        page = render_html(report, plan.config, plan.versions, bad, plan.hash)
        (folder / REPORT_NAME).write_text(page, encoding="utf-8", errors="backslashreplace")
        Manifest(
            tokenizer=TokenizerInfo(
                name=self.config.tokenizer,
                vocab_sha256=tokenizer.vocab_sha256,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                file=copy,
            ),
            splits=report.splits,
            counts=report.counts,
            checksums=checksums,
            config=plan.config,
            versions=plan.versions,
            plan_hash=plan.hash,
        ).save(folder)
