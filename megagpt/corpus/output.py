"""The folder of the dataset: where it is, whether a run may make or replace it, and its publication by one rename.

A run holds the lock file .NAME.lock beside it from its beginning, so that two never make the same folder. What is
replaced must be a dataset and nothing else: a folder with a file that its manifest does not name stays as it is.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.sources import SourceFile, one_line
from megagpt.corpus.workspace import disk_error, locked
from megagpt.data.atomic import fsync_path
from megagpt.data.manifest import FILE_NAME, Manifest, TokenizerInfo
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer
from megagpt.tokenizer.ranks import write_rank_file

REPORT_NAME, DATA_NAME = "report.html", "report.json"


def run_folders(config: CorpusConfig) -> tuple[Path, Path]:
    """The folders of output and work, without links. UsageError: they cannot be such folders."""
    output = Path(config.output).resolve()
    if not config.output or not output.name:
        raise UsageError(f"--output {config.output!r}: is no folder that a dataset could become; name one")
    work_dir = Path(config.execution.work_dir or f"{output}.work").resolve()
    if work_dir.is_relative_to(output):
        raise UsageError(f"--work-dir {one_line(work_dir)}: lies in --output {one_line(output)}; choose one outside")
    return output, work_dir


@contextlib.contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Keep other runs from `output`. UserError: another run makes it, or its parent folder cannot be written."""
    busy = f"output {one_line(output)}: another run is making it; wait for it, or choose another"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(_lock(output), busy))
        except OSError as error:
            raise UserError(
                f"output {one_line(output)}: cannot be written: {error.strerror}; choose another"
            ) from error
        yield


def _lock(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _asides(output: Path, plan_hash: str) -> tuple[Path, Path]:
    """Where the new dataset is made, and where one that it replaces goes meanwhile."""
    name = f".{output.name}.{plan_hash[:16]}"
    return output.with_name(name), output.with_name(f"{name}.old")


def has_remains(output: Path, plan_hash: str) -> bool:
    """Whether a killed run left more than the dataset."""
    return any(path.exists() for path in (_lock(output), *_asides(output, plan_hash)))


def remove_replaced(output: Path, plan_hash: str) -> None:
    """Remove the dataset that was replaced by `output`, which is reserved and finished."""
    for remains in _asides(output, plan_hash):
        if remains.exists():
            shutil.rmtree(remains)


def finished(output: Path, plan_hash: str) -> Manifest | None:
    """The manifest of `output` if it is the dataset of this plan. UserError: not all files have their full size."""
    manifest = Manifest.load(output) if output.is_dir() else None
    if manifest is None or manifest.plan_hash != plan_hash:
        return None
    for name, checksum in manifest.checksums.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != checksum.size:
            raise UserError(
                f"{one_line(path)}: not as the manifest beside it says; give --overwrite to make the dataset again"
            )
    return manifest


def check_replaceable(output: Path, overwrite: bool) -> None:
    """UserError if `output` exists, unless it is an empty folder, or a dataset and `overwrite` allows to replace it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    where = f"output {one_line(output)}"
    manifest = Manifest.load(output) if output.is_dir() else None
    if manifest is None:
        raise UserError(f"{where}: exists, and is not a token dataset; choose another")
    if not overwrite:
        raise UserError(
            f"{where}: exists, made from other input or with other options; choose another, or give --overwrite"
        )
    own = {FILE_NAME, REPORT_NAME, DATA_NAME, *manifest.checksums}
    own |= {f"{split}.{suffix}" for split in manifest.splits for suffix in ("bin", "idx", "ids")}
    for path in sorted(output.iterdir()):
        if path.name not in own or not path.is_file():
            raise UserError(
                f"{where}: {path.name!r} in it is no part of the dataset, and --overwrite would delete it; move it, or "
                "choose another output"
            )


@contextlib.contextmanager
def publishing(output: Path, plan_hash: str, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `output` if all goes well, and if that still may be replaced.

    What a killed run left is removed; the dataset that it was replacing only when there is a new one.
    """
    aside, old = _asides(output, plan_hash)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        for path in aside.iterdir():
            fsync_path(path)
        fsync_path(aside)
        check_replaceable(output, overwrite)
        if output.exists():
            if old.exists():
                shutil.rmtree(old)
            output.rename(old)
        aside.rename(output)
        fsync_path(output.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"output {one_line(output)}: {disk_error(error, output)}") from error
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def write_sources(path: Path, files: Sequence[SourceFile]) -> None:
    """Write the list of input files: line i, from 0, is about the file with index i."""
    with open(path, "w", encoding="utf-8") as lines:
        for file in files:
            lines.write(json.dumps({"file": file.name, "kind": file.kind, "bytes": file.size}) + "\n")


def write_tokenizer(tokenizer: Tokenizer, name: str, folder: Path) -> TokenizerInfo:
    """What the manifest says of the tokenizer that was asked for as `name`; of an own one, write a copy of it."""
    copy = None
    if tokenizer.path is not None:
        copy = f"tokenizer{tokenizer.path.suffix}"
        write_rank_file(tokenizer.ranks, folder / copy)  # and not what its file may have become meanwhile
    return TokenizerInfo(
        name=name,
        vocab_sha256=tokenizer.vocab_sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        file=copy,
    )
