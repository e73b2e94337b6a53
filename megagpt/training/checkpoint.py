"""Checkpoints on disk: complete or absent.

    run_dir/checkpoints/
        step_00001000/
            manifest.json       what it is: step, samples, world size, model, data, every file's size and checksum
            deepspeed/          DeepSpeed's shards: weights, fp32 master weights, optimizer state
        latest                  the name of the newest one

A checkpoint is written to a hidden folder, fsynced, listed in its manifest and renamed; a folder named step_* without a
valid manifest does not count. The price: every byte is read once more for its checksum, by the rank that wrote it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from megagpt.data.atomic import fsync_path, replace_file
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.weights import read_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_SHARD_OWNER = re.compile(r"pp_rank_(\d+)_")
SHARDS = "deepspeed"


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written."""


class CheckpointManifest(BaseModel):
    """manifest.json: what a checkpoint holds and what a run must agree with to continue from it."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences of the global order that those steps read."""
    skipped_steps: int = 0
    """How many of those steps had a non-finite gradient and changed nothing."""
    world_size: int
    zero_stage: int
    precision: str
    global_batch_size: int
    seed: int
    seq_len: int
    document_mask: bool
    no_decay: list[str]
    data_fingerprint: str
    model: dict[str, Any]
    versions: dict[str, str] = {}
    files: dict[str, FileChecksum] = {}


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, manifest: CheckpointManifest, write_shards: Callable[[Path], None], keep: int
) -> Path:
    """Write one checkpoint into `folder` (run_dir/checkpoints); every rank calls it; returns its final path.

    `write_shards(path)` writes this rank's files below path and returns when all ranks have written theirs. Older
    checkpoints beyond the newest `keep` are removed once this one is complete.
    """
    rank = dist.get_rank()
    final = folder / checkpoint_name(manifest.step)
    aside = folder / f".saving_{final.name}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".saving_*"), *folder.glob(".removing_*")):
            shutil.rmtree(leftover)
        aside.mkdir()
    dist.barrier()
    _write(write_shards, aside)
    records: list[dict[str, FileChecksum]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(records, _seal_own_files(aside, rank))
    if rank == 0:
        files = {name: record for part in records for name, record in part.items()}
        content = manifest.model_copy(update={"files": files}).model_dump_json(indent=1) + "\n"
        replace_file(aside / "manifest.json", content.encode())
        fsync_path(aside / SHARDS)
        if final.exists():
            _remove(final)
        os.rename(aside, final)
        fsync_path(folder)
        replace_file(folder / "latest", f"{final.name}\n".encode())
        for form in (*folder.glob(".universal_*"), *folder.glob(".converting_*")):  # of older checkpoints
            shutil.rmtree(form)
        older = [path for path in complete_checkpoints(folder) if path != final]
        for old in older[: max(0, len(older) - keep + 1)]:
            _remove(old)
    dist.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of `folder` whose manifest is there, oldest first."""
    found = [
        path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of `folder` with all its files in full length; damaged ones are named and passed over.

    None if there is none at all. Raises UserError if there are some and none is whole: a run must not start anew over
    them.
    """
    found = complete_checkpoints(folder)
    for path in reversed(found):
        try:
            read_manifest(path)
        except DamagedCheckpointError as error:
            logger.warning("not using %s", error)
        else:
            return path
    if found:
        raise UserError(f"{folder}: every checkpoint in it is damaged; move it away to start the run anew")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or a run folder's newest. Raises UserError if there is none."""
    if (path / "manifest.json").is_file() and (path / SHARDS).is_dir():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or checkpoint")
    newest = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is None:
        raise UserError(f"{path}: holds no complete checkpoint (expected checkpoints/step_*/manifest.json)")
    return newest


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest, after comparing every file's size with it.

    Raises DamagedCheckpointError naming the first file that differs, UserError for a format newer than this version's.
    """
    path = checkpoint / "manifest.json"
    try:
        values = json.loads(path.read_bytes())
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(f"{path}: format {version} is newer than this version of megagpt reads")
        manifest = CheckpointManifest.model_validate(values)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, not UTF-8, not a manifest
        reason = " ".join(str(error).split())[:200]
        raise DamagedCheckpointError(f"{path}: not a checkpoint's manifest ({reason})") from None
    for name, record in manifest.files.items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {record.size}"
            raise DamagedCheckpointError(f"{checkpoint}: {name} {state}; the checkpoint is damaged")
    return manifest


def verify_checksums(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file's checksum, from number `part`, with the manifest: the ranks share the reading.

    Raises DamagedCheckpointError naming the first file that differs.
    """
    for name, record in sorted(read_manifest(checkpoint).files.items())[part::parts]:
        if FileChecksum.of(checkpoint / name).xxh3_128 != record.xxh3_128:
            raise DamagedCheckpointError(
                f"{checkpoint}: {name} is not what was written (its checksum differs); "
                "remove this checkpoint to continue from the one before"
            )


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's fp32 master weights by parameter name, put together from the shards of all ranks, on the CPU."""
    manifest = read_manifest(checkpoint)
    verify_checksums(checkpoint)
    return read_weights(checkpoint / SHARDS, manifest.zero_stage, manifest.world_size)


def _write(write_shards: Callable[[Path], None], aside: Path) -> None:
    """Have the shards written; a failure leaves nothing behind and is told with the space that was left."""
    try:
        write_shards(aside)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        free = shutil.disk_usage(aside.parent).free / 1e9
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"cannot write checkpoint {aside.parent}: {reason} ({free:.1f} GB free there)") from error


def _seal_own_files(folder: Path, rank: int) -> dict[str, FileChecksum]:
    """Fsync and hash the files that this rank wrote: shards carry their rank in the name, the rest is rank 0's."""
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        owner = _SHARD_OWNER.search(path.name)
        if (int(owner.group(1)) if owner else 0) == rank:
            fsync_path(path)
            records[path.relative_to(folder).as_posix()] = FileChecksum.of(path)
    return records


def _remove(checkpoint: Path) -> None:
    """Rename before removing, so that a half-removed folder never looks like a checkpoint."""
    doomed = checkpoint.with_name(f".removing_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)
