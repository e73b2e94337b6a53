"""Checkpoints on disk: complete or absent.

    run_dir/checkpoints/
        step_00001000/
            manifest.json       what it is: step, samples, world size, model, data, every file's size and checksum
            deepspeed/          DeepSpeed's shards: weights, fp32 master weights, optimizer state
            random/             states of each rank's random generators
        latest                  the name of the newest one

A folder named step_* without a valid manifest does not count; megagpt.training.saving writes them. torch is imported
only to load weights, so that what merely looks at a run starts at once.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from megagpt.data.history import BlendHistory
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.schedule import Schedule

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_NAME = re.compile(r"step_(\d{8,})")
SHARDS = "deepspeed"
REPLACED, DAMAGED = ".replacing_", ".damaged_"  # prefixes of checkpoints that no longer count


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written."""


class CheckpointManifest(BaseModel):
    """manifest.json: what a checkpoint holds and what a run must agree with to continue from it."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Position in the global order of sequences after those steps."""
    consumed_tokens: int
    """Tokens that those steps were trained on."""
    skipped_steps: int = 0
    """How many of those steps had a non-finite gradient and changed nothing."""
    world_size: int
    zero_stage: int
    precision: str
    global_batch_size: int
    rampup: tuple[int, int, int] = (0, 0, 0)
    """Sequences of the batch-size ramp-up: first step, increment, end."""
    seed: int
    seq_len: int
    document_mask: bool
    optimizer: str = "adamw"
    no_decay: list[str]
    schedule: Schedule
    """The learning rates of the run, as its last start had them."""
    sharding: dict[str, Any] = {}
    """Raw DeepSpeed options that decide how the shards are cut."""
    skipped_samples: list[tuple[int, int]] = []
    """Ranges (start, stop) of samples that are never read, since a batch of them made the loss spike."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because of a spike."""
    evaluation_due: bool = False
    """Whether the evaluation after this step was cut off by a signal, and comes first when the run goes on."""
    started: float = 0.0
    """When the run was first started, seconds since 1970."""
    productive_seconds: float = 0.0
    """Time that the steps took which led here."""
    recent_losses: list[float] = []
    """Losses of the last steps, with which the next one is compared."""
    data: BlendHistory
    """What was read of each dataset, blend by blend."""
    model: dict[str, Any]
    versions: dict[str, str] = {}
    files: dict[str, FileChecksum] = {}


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of `folder` whose manifest is there, oldest first."""
    found = [
        path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(folder: Path, damaged: Collection[Path] = ()) -> Path | None:
    """The newest checkpoint of `folder` with all its files in full length; damaged ones are named and passed over.

    damaged: checkpoints that are known to be. None if there is none at all. Raises UserError if there are some and none
    is whole: a run must not start anew over them.
    """
    found = complete_checkpoints(folder)
    for path in reversed(found):
        if path in damaged:
            continue
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

    Raises DamagedCheckpointError naming the first file that differs, UserError for a format that is not this version's.
    """
    path = checkpoint / "manifest.json"
    try:
        values = json.loads(path.read_bytes())
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(
                f"{path}: has format {version}, but this version of megagpt reads format {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
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
                f"{checkpoint}: {name} is not what was written (its checksum differs); the checkpoint is damaged"
            )


def rescue(folder: Path) -> None:
    """Give back what a killed process was about to replace: the old checkpoint, set aside, but no new one in place."""
    for aside in folder.glob(f"{REPLACED}step_*"):
        original = folder / aside.name.removeprefix(REPLACED)
        if not original.exists():
            aside.rename(original)


def set_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint out of the count; the next one that is saved removes it. Raises UserError."""
    target = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    try:
        shutil.rmtree(target, ignore_errors=True)  # from an earlier time
        checkpoint.rename(target)
    except OSError as error:
        raise UserError(f"{checkpoint}: is damaged and cannot be set aside: {error.strerror}") from error


def damage_of(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files that `verify_checksums` would read; None if nothing.

    Raises UserError where the disk does not answer: that says nothing about the checkpoint.
    """
    try:
        verify_checksums(checkpoint, part, parts)
    except (DamagedCheckpointError, FileNotFoundError) as error:
        return str(error)
    except OSError as error:
        raise UserError(f"{checkpoint}: cannot be read: {error.strerror}; start again when it can") from error
    return None


def load_weights(checkpoint: Path) -> "dict[str, torch.Tensor]":
    """The model's fp32 master weights by parameter name, put together from the shards of all ranks, on the CPU."""
    from megagpt.training.weights import read_weights

    manifest = read_manifest(checkpoint)
    verify_checksums(checkpoint)
    return read_weights(checkpoint / SHARDS, manifest.zero_stage, manifest.world_size)
