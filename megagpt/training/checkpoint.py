"""Checkpoints on disk: complete or absent.

    run_dir/checkpoints/
        step_00001000/
            manifest.json       what it is: step, samples, world size, model, data, every file's size and checksum
            deepspeed/          DeepSpeed's shards: weights, fp32 master weights, optimizer state
        latest                  the name of the newest one

A checkpoint is written to a hidden folder, fsynced, listed in its manifest and renamed; a folder named step_* without a
valid manifest does not count. The price: every byte is read once more for its checksum, by the rank that wrote it.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.data.atomic import fsync_path, replace_file
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.weights import read_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_SHARD_OWNER = re.compile(r"pp_rank_(\d+)_")
SHARDS = "deepspeed"


class CheckpointManifest(BaseModel):
    """manifest.json: what a checkpoint holds and what a run must agree with to continue from it."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences of the global order that those steps read."""
    world_size: int
    zero_stage: int
    precision: str
    global_batch_size: int
    seed: int
    seq_len: int
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
    write_shards(aside)
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
        for old in complete_checkpoints(folder)[:-keep]:
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
    """The newest checkpoint of `folder` with all its files in full length; damaged ones are named and passed over."""
    for path in reversed(complete_checkpoints(folder)):
        try:
            read_manifest(path)
        except UserError as error:
            logger.warning("not using %s", error)
        else:
            return path
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
    """The manifest, after comparing every file's size with it. Raises UserError naming the first file that differs."""
    path = checkpoint / "manifest.json"
    try:
        manifest = CheckpointManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable checkpoint manifest ({' '.join(str(error).split())[:200]})") from None
    if manifest.format_version > FORMAT_VERSION:
        raise UserError(f"{path}: format {manifest.format_version} is newer than this version of megagpt reads")
    for name, record in manifest.files.items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {record.size}"
            raise UserError(f"{checkpoint}: {name} {state}; the checkpoint is damaged")
    return manifest


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's fp32 master weights by parameter name, put together from the shards of all ranks, on the CPU."""
    manifest = read_manifest(checkpoint)
    return read_weights(checkpoint / SHARDS, manifest.zero_stage, manifest.world_size)


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
