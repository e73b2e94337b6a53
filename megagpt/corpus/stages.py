"""The stages that find out what becomes of every document, one after another.

    evaluation ─▶ extract ─▶ exact ─▶ keys ─▶ bands ─▶ clusters ─▶ select ─▶ tokenize ─▶ write

(and before `tokenize`, where there is much text, `proof`: that a faster encoder gives the same ids.)

Each is a list of tasks that know nothing of each other; a task works on a part of the corpus of a bounded size, or on
a stretch of sorted files, in bounded memory. Their results lie in the work folder.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.corpus.clusters import ClustersTask
from megagpt.corpus.config import TRAIN, CorpusConfig
from megagpt.corpus.decontaminate import EvaluationTask
from megagpt.corpus.documents import Documents
from megagpt.corpus.exact import ExactTask, KeyRange
from megagpt.corpus.executor import Observer, Pool, StageResult, Task, run_stage
from megagpt.corpus.extract import ExtractTask
from megagpt.corpus.hashing import UInt64
from megagpt.corpus.near import BandTask, KeysTask
from megagpt.corpus.plan import Plan
from megagpt.corpus.quarantine import QUARANTINE_NAME, Quarantined, check_bad_ratio, write_quarantine
from megagpt.corpus.reasons import REASONS, STAGES
from megagpt.corpus.report import StageTime
from megagpt.corpus.screening import Screening
from megagpt.corpus.select import SelectTask, kept_draws
from megagpt.corpus.sources import one_line
from megagpt.corpus.splits import nominal_bounds, settled_bounds
from megagpt.corpus.tokenize import BYTES_WORTH_A_PROOF, ProofTask, TokenizeTask
from megagpt.corpus.workspace import disk_error
from megagpt.corpus.write import WriteTask, write_tasks
from megagpt.data.indexed import token_dtype
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer
from megagpt.tokenizer.fast import PROOF_SHARES, Backend, installed_version


@dataclass(frozen=True)
class Results:
    """What the stages left in the work folder."""

    documents: Documents
    stages: dict[str, StageResult]
    """By name; those that the configuration asks for."""
    written: dict[str, list[Path]]
    """Results of the stage `write` by split, for every split that has documents."""
    quarantine: Path
    """The list of what could not be read."""
    bad: list[Quarantined]
    """Its records by reason."""
    times: list[StageTime]
    """The stages in order."""
    counts: dict[str, int]
    """Documents and bytes by what became of them."""


class Stages:
    """The stages of one run; `run` is its life from top to bottom."""

    def __init__(
        self,
        config: CorpusConfig,
        plan: Plan,
        tokenizer: Tokenizer,
        folder: Path,
        pool: Pool,
        observe: Observer,
        limits: Sequence[int | None] | None = None,
    ) -> None:
        """`limits`: for each chunk the bytes of records after which reading ends; None: it is read whole."""
        self.limits = limits or [None] * len(plan.chunks)
        self.config, self.plan, self.tokenizer = config, plan, tokenizer
        self.folder, self.pool, self.observe = folder, pool, observe
        self.dtype = token_dtype(tokenizer.vocab_size).str
        self.split_names = [TRAIN, *config.shares]
        self.times: list[StageTime] = []
        self.results: dict[str, StageResult] = {}

    def run(self) -> Results:
        """Do what is not yet done. UserError: see `preprocess`."""
        extract = self._extract()
        quarantine = self.folder / QUARANTINE_NAME
        try:
            bad = write_quarantine(quarantine, extract.folders, self.plan.files)
            documents = Documents.of(extract.folders).saved(self.folder / "documents.pickle")
        except OSError as error:
            raise UserError(f"work folder {one_line(self.folder)}: {disk_error(error, self.folder)}") from error
        check_bad_ratio(quarantine, extract.total("bad"), extract.total("documents"), self.config.max_bad)
        exact, clusters = self._find_duplicates(documents)
        select, bounds = self._select(documents, exact, clusters)
        tokenize = self._tokenize(documents, select, bounds)
        written = self._write(documents, tokenize)
        counts = self._counts(extract, select, tokenize)
        return Results(documents, self.results, written, quarantine, bad, self.times, counts)

    def _extract(self) -> StageResult:
        config, evaluation = self.config, None
        if self.plan.evaluation:
            decontaminate = config.decontaminate
            task = EvaluationTask(
                tuple(self.plan.evaluation), tuple(decontaminate.text_keys), decontaminate.ngram_words, config.clean
            )
            (evaluation,) = self._stage("evaluation", [task]).folders
        screening = Screening(config.clean, config.filter, config.decontaminate, evaluation)
        tasks = [
            ExtractTask(chunk, config.text_key, config.max_document_bytes, screening, config.dedup, limit)
            for chunk, limit in zip(self.plan.chunks, self.limits, strict=True)
        ]
        return self._stage("extract", tasks)

    def _find_duplicates(self, documents: Documents) -> tuple[list[Path], list[Path]]:
        """The results of the stages `exact` and `clusters`."""
        dedup = self.config.dedup
        if dedup.method == "none":
            return [], []
        ranges = KeyRange.split(len(documents))
        exact = self._stage("exact", [ExactTask(documents, keys) for keys in ranges]).folders
        if dedup.method == "exact":
            return exact, []
        self._stage("keys", [KeysTask(part, exact, dedup) for part in documents.parts])
        keys = self.folder / "keys"
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
        config, backend = self.config, self._proven_backend()
        tasks = [
            TokenizeTask(
                part=part,
                select=folder,
                bounds=bounds,
                tokenizer=config.tokenizer,
                vocab_sha256=self.tokenizer.vocab_sha256,
                dtype=self.dtype,
                vocab_dir=config.execution.vocab_dir,
                backend=backend,
                is_required=config.execution.tokenizer_backend != "auto",
                shuffle=config.shuffle,
                seed=config.seed,
            )
            for part, folder in zip(documents.parts, select.folders, strict=True)
        ]
        return self._stage("tokenize", tasks)

    def _proven_backend(self) -> Backend:
        """Who encodes: what was asked for, which was proven when the run began; or gigatoken, if the text is worth the
        proof, which the workers share, and that succeeds."""
        execution, version = self.config.execution, installed_version()
        if execution.tokenizer_backend != "auto":
            return execution.tokenizer_backend
        if version is None or self.results["extract"].total("kept_text_bytes") < BYTES_WORTH_A_PROOF:
            return "tiktoken"
        # The version is no part of the plan: a run that goes on may find another one installed.
        proven = self.folder / "proven_version"
        if not proven.exists() or proven.read_text(encoding="utf-8") != version:
            shutil.rmtree(self.folder / "proof", ignore_errors=True)
            proven.write_text(version, encoding="utf-8")
        own = (self.config.tokenizer, execution.vocab_dir, self.tokenizer.vocab_sha256)
        proof = self._stage("proof", [ProofTask(*own, share) for share in range(PROOF_SHARES)])
        return "tiktoken" if proof.total("failures") else "gigatoken"

    def _write(self, documents: Documents, tokenize: StageResult) -> dict[str, list[Path]]:
        """Bring the documents of each split into their order: the results of the stage `write` by split."""
        tasks: list[WriteTask] = []
        ends = []
        for split in range(len(self.split_names)):
            folder, shuffle = self.folder / "tokenize", self.config.shuffle
            tasks += write_tasks(documents, folder, split, tokenize.receipts, shuffle, self.dtype)
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
        self.times.append(StageTime.of(name, result, time.monotonic() - start))
        self.results[name] = result
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
            "contaminated": extract.total("contaminated"),
            "kept": select.total("kept"),
            "kept_text_bytes": tokenize.total("text_bytes"),
        }
