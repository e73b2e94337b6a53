"""What a run would take and give, found out by running its stages on a sample of the input.

The sample is spread evenly over the stored bytes of the input; counts and times are scaled by the share of these that
it read. Duplicates are the exception: of a pair the sample shows nothing unless both documents are in it, so that there
is a least number, all copies being neighbours in the input, and a largest one, all being spread over it at random.
"""

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.executor import LocalPool, Observer, Pool, StageResult
from megagpt.corpus.output import run_folders
from megagpt.corpus.plan import Chunk, Plan, cut_into_chunks, make_plan
from megagpt.corpus.reasons import STAGES
from megagpt.corpus.sources import Piece
from megagpt.corpus.stages import Results, Stages
from megagpt.corpus.workspace import open_workspace
from megagpt.data.indexed import token_dtype
from megagpt.data.origins import ORIGIN
from megagpt.tokenizer import load_tokenizer

SAMPLE_PIECES, SAMPLE_BYTES = 48, 1 << 20
"""The sample: so many places in the input, and about so many bytes read at each."""

_MOST_PIECES = 1 << 16  # that the input is cut into to choose from
_INDEX_BYTES = 20  # of a document in .idx


@dataclass(frozen=True)
class Estimate:
    """What to expect of a run."""

    files: int
    input_bytes: int
    """Stored bytes of the input."""
    share: float
    """Share of them that was read, 0 to 1; 1: everything."""
    documents: int
    """Documents in the input."""
    removed: dict[str, float]
    """Share of them that each stage that looks at single documents removes, 0 to 1."""
    least_duplicates: float
    """Share of the documents left that are duplicates, 0 to 1, if copies are neighbours in the input."""
    most_duplicates: float
    """The same, if they are spread over it at random."""
    most_tokens: int
    """Tokens of all splits with the least duplicates."""
    least_tokens: int
    """Tokens of all splits with the most duplicates."""
    seconds: dict[str, float]
    """Duration of each stage."""
    workers: int
    """Processes that this holds for."""
    work_bytes: int
    """Disk that the work folder needs."""
    output_bytes: int
    """Disk that the dataset needs, at most."""
    sample_seconds: float
    """What the estimate took."""


def estimate(config: CorpusConfig, pool: Pool | None = None, observe: Observer = lambda _: None) -> Estimate:
    """Run the stages on a sample in a folder of its own beside the work folder, which is removed again.

    UserError: as of `preprocess`.
    """
    start = time.monotonic()
    output, work_dir = run_folders(config)
    tokenizer = load_tokenizer(config.tokenizer, config.execution.vocab_dir)
    plan = make_plan(config, tokenizer, written=(output, work_dir))
    chunks, limits = sample_chunks(plan)
    sample = replace(plan, chunks=chunks)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, work_dir)
        folder = stack.enter_context(open_workspace(work_dir / f"estimate-{plan.hash[:16]}"))
        stack.callback(shutil.rmtree, folder)
        shutil.rmtree(folder)  # nothing of an earlier one
        folder.mkdir()
        workers = config.execution.workers or len(os.sched_getaffinity(0))
        pool = pool or stack.enter_context(LocalPool(workers))
        results = Stages(config, sample, tokenizer, folder, pool, observe, limits).run()
        work_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    return _scaled(plan, results, pool.workers, work_bytes, itemsize, time.monotonic() - start)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # other runs' folders are in it
        folder.rmdir()


def sample_chunks(plan: Plan) -> tuple[list[Chunk], list[int | None]]:
    """Stretches at evenly spaced places of the input, and the bytes of records to read of each; None: all.

    Of files that can only be read from their beginning, and of Parquet files, whose row groups may be large, that is
    the beginning, for all places in the file.
    """
    step = max(SAMPLE_BYTES, sum(file.size for file in plan.files) // _MOST_PIECES)
    pieces = [piece for chunk in cut_into_chunks(plan.files, step) for piece in chunk.pieces]
    ends = np.cumsum([piece.stop - piece.start for piece in pieces])
    if ends[-1] <= SAMPLE_PIECES * SAMPLE_BYTES:
        return plan.chunks, [None] * len(plan.chunks)
    places = (2 * np.arange(SAMPLE_PIECES) + 1) * int(ends[-1]) // (2 * SAMPLE_PIECES)
    numbers = np.searchsorted(ends, places, side="right").tolist()
    firsts = {piece.file_index: number for number, piece in reversed(list(enumerate(pieces)))}
    wanted = Counter(n if _is_cut(pieces[n]) else firsts[pieces[n].file_index] for n in numbers)
    limits = [None if _is_cut(pieces[number]) else count * SAMPLE_BYTES for number, count in wanted.items()]
    stops = [*list(wanted)[1:], len(pieces)]
    stretches = zip(wanted.items(), stops, strict=True)
    return [Chunk(_stretch(pieces[n:stop], count * SAMPLE_BYTES)) for (n, count), stop in stretches], limits


def _is_cut(piece: Piece) -> bool:
    return piece.file.can_begin_anywhere


def _stretch(pieces: Sequence[Piece], size: int) -> tuple[Piece, ...]:
    """About `size` bytes from the beginning of the first piece on: of it, and, if it is small, of those after it."""
    found: list[Piece] = []
    for piece in pieces:
        if size <= 0 or _is_cut(piece) != _is_cut(pieces[0]):  # which are limited in different ways
            break
        if _is_cut(piece):
            piece = replace(piece, stop=min(piece.stop, piece.start + size))
        elif piece.start > 0:  # of a file that is found already
            continue
        else:
            piece = replace(piece, stop=piece.file.size)
        found.append(piece)
        size -= piece.stop - piece.start
    return tuple(found)


def _scaled(
    plan: Plan, results: Results, workers: int, work_bytes: int, itemsize: int, sample_seconds: float
) -> Estimate:
    counts, extract = results.counts, results.stages["extract"]
    input_bytes = sum(file.size for file in plan.files)
    share = min(1.0, extract.total("stored_bytes") / max(1, input_bytes))
    scale = 1 / max(share, 1e-12)
    seconds = {name: _seconds(name, result, scale, workers) for name, result in results.stages.items()}
    documents = max(1, counts["documents"])
    left = max(1, extract.total("kept"))
    duplicates = (counts["removed_exact"] + counts["removed_near"]) / left
    most = min(1.0, duplicates * scale)
    tokens = results.stages["tokenize"].total("tokens") * scale
    kept = counts["kept"] * scale
    return Estimate(
        files=len(plan.files),
        input_bytes=input_bytes,
        share=share,
        documents=round(counts["documents"] * scale),
        removed={stage: counts[f"removed_{stage}"] / documents for stage in STAGES if stage not in ("exact", "near")},
        least_duplicates=duplicates,
        most_duplicates=most,
        most_tokens=round(tokens),
        least_tokens=round(tokens * (1 - most) / max(1e-12, 1 - duplicates)) if duplicates < 1 else 0,
        seconds=seconds,
        workers=workers,
        work_bytes=round(work_bytes * scale),
        output_bytes=round(tokens * itemsize + kept * (_INDEX_BYTES + ORIGIN.itemsize)),
        sample_seconds=sample_seconds,
    )


def _seconds(name: str, result: StageResult, scale: float, workers: int) -> float:
    """Duration of a stage of the whole run, its work being divided among the workers, but for `clusters`."""
    if name == "proof":  # which is as long for any text
        scale = 1.0
    tasks = 1 if name == "clusters" else max(1, round(len(result.receipts) * scale))
    return sum(receipt["seconds"] for receipt in result.receipts) * scale / min(workers, tasks)
