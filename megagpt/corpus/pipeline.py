"""From text to a token dataset: plan, run the stages (see `stages`), publish.

The stages' results lie in the work folder, named by the plan, from where an interrupted run goes on. The dataset
appears when all is done, by one rename.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.executor import LocalPool, Observer, Pool, Progress, start_fork_server
from megagpt.corpus.gather import make_report
from megagpt.corpus.output import (
    DATA_NAME,
    REPORT_NAME,
    check_replaceable,
    finished,
    has_remains,
    publishing,
    remove_replaced,
    reserved,
    run_folders,
    write_sources,
    write_tokenizer,
)
from megagpt.corpus.plan import make_plan
from megagpt.corpus.quarantine import CONTAMINATED_NAME, QUARANTINE_NAME, check_bad_ratio, write_contaminated
from megagpt.corpus.removed import REMOVED_NAME, write_removed
from megagpt.corpus.report import Report, StageTime
from megagpt.corpus.stages import Results, Stages
from megagpt.corpus.workspace import BusyError, open_workspace, remove_workspace, workspace_exists
from megagpt.corpus.write import join
from megagpt.data.manifest import FileChecksum, Manifest, SplitInfo
from megagpt.data.origins import SOURCES_NAME
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.fast import DocumentEncoder


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
    if pool is None:
        start_fork_server()  # while the run is planned
    tokenizer = load_tokenizer(config.tokenizer, config.execution.vocab_dir)
    if config.execution.tokenizer_backend == "gigatoken":
        DocumentEncoder(tokenizer, "gigatoken")  # an error now, and not in a worker later
    plan = make_plan(config, tokenizer, written=(output, work_dir))
    folder = work_dir / f"{plan.hash[:16]}-{plan.chunk_bytes}"
    if not overwrite and (manifest := finished(output, plan.hash)):
        counts = manifest.counts
        check_bad_ratio(output / QUARANTINE_NAME, counts["bad"], counts["documents"], config.max_bad)
        _remove_remains(config, output, plan.hash, folder)
        _remove_if_empty(work_dir)
        return Report(Path(config.output), counts, manifest.splits, seconds=time.monotonic() - start)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reserved(output))
        check_replaceable(output, overwrite)
        stack.enter_context(open_workspace(folder))
        workers = config.execution.workers or len(os.sched_getaffinity(0))
        run = Stages(config, plan, tokenizer, folder, pool or stack.enter_context(LocalPool(workers)), observe)
        report = _publish(run, run.run(), output, overwrite, start)
        if not config.execution.keep_work:
            remove_workspace(folder)
    _remove_if_empty(work_dir)
    return report


def _remove_remains(config: CorpusConfig, output: Path, plan_hash: str, folder: Path) -> None:
    """Remove what a run that was killed after its dataset appeared left, unless other runs use it."""
    if has_remains(output, plan_hash):
        with contextlib.suppress(BusyError), reserved(output):
            remove_replaced(output, plan_hash)
    if not config.execution.keep_work and workspace_exists(folder):
        with contextlib.suppress(BusyError), open_workspace(folder):
            remove_workspace(folder)


def _remove_if_empty(work_dir: Path) -> None:
    with contextlib.suppress(OSError):  # other runs' folders are in it
        work_dir.rmdir()


def _publish(run: Stages, results: Results, output: Path, overwrite: bool, start: float) -> Report:
    """Make the folder of the dataset; `start` is when the run began, in time.monotonic's seconds."""
    with publishing(output, run.plan.hash, overwrite) as aside:
        splits = _join(run, results, aside)
        write_removed(aside / REMOVED_NAME, results.stages["select"].folders)
        write_sources(aside / SOURCES_NAME, run.plan.files)
        shutil.copyfile(results.quarantine, aside / QUARANTINE_NAME)
        if run.plan.evaluation and run.config.decontaminate.action == "report":
            write_contaminated(aside / CONTAMINATED_NAME, results.stages["extract"].folders, run.plan.files)
        _describe(run, results, splits, aside)
        report = make_report(run.config, run.plan, results, splits, run.folder, time.monotonic() - start)
        (aside / DATA_NAME).write_text(report.to_json(), encoding="ascii")
        (aside / REPORT_NAME).write_text(report.to_html(), encoding="utf-8", errors="backslashreplace")
    return report


def _join(run: Stages, results: Results, folder: Path) -> dict[str, SplitInfo]:
    """The files of every split that has documents."""
    start = time.monotonic()
    splits: dict[str, SplitInfo] = {}
    for name, parts in results.written.items():
        run.observe(Progress("join", len(results.written), len(splits), 0, {}, {}))
        splits[name] = join(folder / name, parts, run.dtype)
    run.observe(Progress("join", len(splits), len(splits), 0, {}, {}))
    results.times.append(StageTime("join", len(splits), 0, time.monotonic() - start))
    return splits


def _describe(run: Stages, results: Results, splits: dict[str, SplitInfo], folder: Path) -> None:
    """Write the manifest and a copy of an own tokenizer."""
    plan, tokenizer = run.plan, write_tokenizer(run.tokenizer, run.config.tokenizer, folder)
    checksums = {path.name: FileChecksum.of(path) for path in sorted(folder.iterdir())}
    Manifest(
        tokenizer=tokenizer,
        splits=splits,
        counts=results.counts,
        checksums=checksums,
        config=plan.config,
        versions=plan.versions,
        plan_hash=plan.hash,
    ).save(folder)
