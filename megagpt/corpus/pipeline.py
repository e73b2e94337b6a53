"""From text files to a token dataset: the stages of a run, one after another.

    extract ─▶ exact ─▶ signatures ─▶ bands ─▶ clusters ─▶ select ─▶ tokenize ─▶ write

Each stage is a list of tasks that know nothing of each other; their results lie in the work folder, named by the
plan, from where an interrupted run goes on. The dataset appears when all is done, by one rename.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.exact import ExactTask
from megagpt.corpus.executor import LocalPool, Observer, Pool, Progress, StageResult, Task, run_stage
from megagpt.corpus.extract import ExtractTask
from megagpt.corpus.merge import write_split
from megagpt.corpus.near import BandTask, ClustersTask, SignaturesTask
from megagpt.corpus.output import REPORT_NAME, check_replaceable, finished, publishing, reserved, run_folders
from megagpt.corpus.plan import Plan, make_plan
from megagpt.corpus.quarantine import QUARANTINE_NAME, check_bad_ratio, write_quarantine
from megagpt.corpus.removed import write_removed
from megagpt.corpus.report import Report, StageTime, render_html
from megagpt.corpus.select import SPLITS, SelectTask
from megagpt.corpus.sources import one_line
from megagpt.corpus.tokenize import TokenizeTask
from megagpt.corpus.workspace import disk_error, open_workspace
from megagpt.data.indexed import token_dtype
from megagpt.data.manifest import FileChecksum, Manifest, SplitInfo, TokenizerInfo
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
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
        self.times: list[StageTime] = []

    def make(self, output: Path, overwrite: bool, start: float) -> Report:
        """Make the dataset and publish it as `output`; `start` is when the run began, in time.monotonic's seconds."""
        config = self.config
        extract = self._stage(
            "extract",
            [ExtractTask(chunk, config.text_key, config.clean, config.dedup) for chunk in self.plan.chunks],
        )
        chunks = extract.folders
        quarantine = self.folder / QUARANTINE_NAME
        bad = self._quarantine(quarantine, chunks)
        check_bad_ratio(quarantine, extract.total("bad"), extract.total("documents"), config.max_bad)
        select = self._select(chunks)
        tokenize = self._tokenize(extract, select.folders[0])

        counts = {
            "files": len(self.plan.files),
            "input_bytes": extract.total("bytes"),
            "bad": extract.total("bad"),
            "harmless": extract.total("harmless"),
            "documents": extract.total("documents"),
            "text_bytes": extract.total("text_bytes"),
            "removed_clean": select.total("clean"),
            "removed_exact": select.total("exact"),
            "removed_near": select.total("near"),
            "kept": select.total("kept"),
            "kept_text_bytes": tokenize.total("text_bytes"),
        }
        with publishing(output, self.plan.hash, overwrite) as aside:
            splits = self._write(aside, tokenize.folders)
            write_removed(aside / "removed.jsonl.zst", select.folders[0], chunks, self.plan.files)
            shutil.copyfile(quarantine, aside / QUARANTINE_NAME)
            report = Report(Path(config.output), counts, splits, self.times, time.monotonic() - start)
            self._describe(aside, report, bad)
        return report

    def _quarantine(self, path: Path, chunks: list[Path]) -> dict[str, int]:
        """Write the list of what could not be read; return the number of records by reason."""
        try:
            return write_quarantine(path, chunks, self.plan.files)
        except OSError as error:
            raise UserError(f"work folder {one_line(self.folder)}: {disk_error(error, self.folder)}") from error

    def _select(self, chunks: list[Path]) -> StageResult:
        """Find the duplicates and decide about every document."""
        config = self.config
        exact = signatures = clusters = None
        if config.dedup.method != "none":
            (exact,) = self._stage("exact", [ExactTask(chunks)]).folders
        if config.dedup.method == "minhash":
            assert exact is not None
            (signatures,) = self._stage("signatures", [SignaturesTask(chunks, exact, config.dedup)]).folders
            tasks = [BandTask(signatures, band, config.dedup) for band in range(config.dedup.banding[0])]
            bands = self._stage("bands", tasks).folders
            (clusters,) = self._stage("clusters", [ClustersTask(signatures, bands, config.dedup)]).folders
        task = SelectTask(chunks, exact, signatures, clusters, config.validation_fraction, config.seed)
        return self._stage("select", [task])

    def _tokenize(self, extract: StageResult, select: Path) -> StageResult:
        config = self.config
        tasks, first_document = [], 0
        for chunk, folder, receipt in zip(self.plan.chunks, extract.folders, extract.receipts, strict=True):
            tasks.append(
                TokenizeTask(
                    name=str(chunk),
                    chunk=folder,
                    first_document=first_document,
                    select=select,
                    tokenizer=config.tokenizer,
                    vocab_sha256=self.tokenizer.vocab_sha256,
                    dtype=token_dtype(self.tokenizer.vocab_size).str,
                    vocab_dir=config.execution.vocab_dir,
                    shuffle=config.shuffle,
                    seed=config.seed,
                )
            )
            first_document += int(receipt["documents"])
        return self._stage("tokenize", tasks)

    def _stage(self, name: str, tasks: Sequence[Task]) -> StageResult:
        start = time.monotonic()
        result = run_stage(self.pool, self.folder / name, tasks, self.observe)
        self.times.append(StageTime(name, len(tasks), result.reused, time.monotonic() - start))
        return result

    def _write(self, folder: Path, chunks: list[Path]) -> dict[str, SplitInfo]:
        """The token files of every split that has documents."""
        start = time.monotonic()
        dtype = token_dtype(self.tokenizer.vocab_size)
        splits = {}
        for number, name in enumerate(SPLITS):
            self.observe(Progress("write", len(SPLITS), number, 0, {}))
            if split := write_split(folder / name, number, chunks, dtype):
                splits[name] = split
        self.observe(Progress("write", len(SPLITS), len(SPLITS), 0, {}))
        self.times.append(StageTime("write", len(SPLITS), 0, time.monotonic() - start))
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
