"""The universal form of a checkpoint: what every world size, ZeRO stage and precision can continue from.

    run_dir/checkpoints/.universal_step_00001000/
        manifest.json                      whose form it is, and every file's size and checksum
        parameters/NAME.safetensors        one parameter: "fp32", the optimizer's exp_avg, exp_avg_sq, step

One process makes it, tensor by tensor out of memory-mapped shards, which it lets go of after half a shard: it never
holds more than that and two tensors. It costs as much disk as the weights and optimizer state in fp32. Written aside,
fsynced and renamed: complete or absent. Nothing in it is pickled.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from megagpt.data.atomic import fsync_path, replace_file
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.checkpoint import SHARDS, DamagedCheckpointError, read_manifest
from megagpt.training.shards import Shards, State
from megagpt.training.tensor_files import write_tensors
from megagpt.training.weights import MAPPED_BYTES, Mapped, Weight

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_PARAMETERS = "parameters"
_SUFFIX = ".safetensors"


class UniversalManifest(BaseModel):
    """manifest.json of a universal form."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    source: str
    """xxh3-128 of the checkpoint's manifest.json, and with it of all its files."""
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences that those steps read."""
    skipped_steps: int
    """How many of those steps changed nothing."""
    loss_scale: float | None
    """Factor of the loss in fp16; null in other precisions."""
    files: dict[str, FileChecksum]


def universal_form(
    checkpoint: Path, folder: Path | None = None, report: Callable[[float], None] = lambda fraction: None
) -> Path:
    """Convert `checkpoint` into `folder` (default: the folder it is in) unless that was done; returns the form's path.

    `report` is told the fraction that is done. Other forms in `folder`, whole or half made, are removed: a run needs
    one. One process at a time may do this. Raises UserError for a damaged checkpoint, or if `folder` cannot be written.
    """
    folder = folder or checkpoint.parent
    final = folder / f".universal_{checkpoint.name}"
    if is_form_of(final, checkpoint):
        return final
    aside = folder / f".converting_{checkpoint.name}"
    try:
        remove_universal_forms(folder)
        (aside / _PARAMETERS).mkdir(parents=True)
        _convert(checkpoint, aside, report)
        os.rename(aside, final)
        fsync_path(folder)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.is_dir() else 0.0
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot write universal form {final}: {error} ({free:.1f} GB free there)") from error
    return final


def is_form_of(form: Path, checkpoint: Path) -> bool:
    """Whether `form` is there, in full length, and was made of this very checkpoint."""
    try:
        return read_universal(form).source == _identity(checkpoint)
    except DamagedCheckpointError as error:
        if form.exists():
            logger.warning("not using %s", error)
        return False


def remove_universal_forms(folder: Path) -> None:
    """Remove all universal forms of `folder`, whole or half made."""
    for form in (*folder.glob(".universal_*"), *folder.glob(".converting_*")):
        shutil.rmtree(form)


def read_universal(form: Path) -> UniversalManifest:
    """The manifest, after comparing every file's size with it. Raises DamagedCheckpointError for what differs."""
    path = form / "manifest.json"
    try:
        manifest = UniversalManifest.model_validate_json(path.read_bytes())
        for name, record in manifest.files.items():
            if (size := (form / name).stat().st_size) != record.size:
                raise DamagedCheckpointError(f"{form}: {name} has {size} bytes instead of {record.size}")
    except OSError as error:
        raise DamagedCheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except ValidationError:
        raise DamagedCheckpointError(f"{path}: not a universal form's manifest") from None
    if manifest.format_version != FORMAT_VERSION:
        raise DamagedCheckpointError(f"{path}: format {manifest.format_version} is not this version's")
    return manifest


def verify_universal(form: Path, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file's checksum, from number `part`, with the manifest: the ranks share the reading.

    Raises DamagedCheckpointError naming the first file that differs.
    """
    for name, record in sorted(read_universal(form).files.items())[part::parts]:
        try:
            found = FileChecksum.of(form / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{form}: {name} cannot be read: {error.strerror}") from error
        if found.xxh3_128 != record.xxh3_128:
            raise DamagedCheckpointError(f"{form}: {name} is not what was written (its checksum differs)")


def damage_of_form(form: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files that `verify_universal` would read; None if nothing."""
    try:
        verify_universal(form, part, parts)
    except DamagedCheckpointError as error:
        return str(error)
    return None


class Parameter:
    """One parameter of a universal form; tensors are memory-mapped, so that a slice costs what it holds."""

    def __init__(self, form: Path, name: str) -> None:
        """Raises UserError if there is no such parameter, or its file is not readable."""
        self.name = name
        path = form / _PARAMETERS / f"{name}{_SUFFIX}"
        try:
            self._file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    def state(self) -> State:
        """ "fp32", the optimizer's tensors and its scalars, as `Shards.read` gave them."""
        numbers = {key: json.loads(value) for key, value in (self._file.metadata() or {}).items()}
        return {key: self._file.get_tensor(key) for key in self._file.keys()} | numbers  # noqa: SIM118 - no mapping


def _convert(checkpoint: Path, aside: Path, report: Callable[[float], None]) -> None:
    """Write everything of `checkpoint` into `aside`, the manifest last."""
    source = read_manifest(checkpoint)
    folder = checkpoint / SHARDS
    largest = max(record.size for record in source.files.values())
    shards = Mapped(lambda: Shards(folder, source.zero_stage, source.world_size), max(MAPPED_BYTES, largest // 2))
    shapes, loss_scale = shards.opened().shapes, shards.opened().loss_scale
    total, done = sum(shape.numel() for shape in shapes.values()), 0
    files = {}
    for name, shape in shapes.items():
        path = aside / _PARAMETERS / f"{name}{_SUFFIX}"
        files[path.relative_to(aside).as_posix()] = _write_parameter(path, name, shards)
        done += shape.numel()
        report(done / total)
    fsync_path(aside / _PARAMETERS)
    manifest = UniversalManifest(
        source=_identity(checkpoint),
        step=source.step,
        consumed_samples=source.consumed_samples,
        skipped_steps=source.skipped_steps,
        loss_scale=loss_scale if source.precision == "fp16" else None,
        files=files,
    )
    replace_file(aside / "manifest.json", f"{manifest.model_dump_json(indent=1)}\n".encode())


def _write_parameter(path: Path, name: str, shards: Mapped[Shards]) -> FileChecksum:
    """One parameter's tensors, each read when the one before is written, and its scalars: 0-d tensors or numbers."""
    tensors: dict[str, Weight] = {}
    numbers = {}
    shape = tuple(shards.opened().shapes[name])
    for key, value in shards.opened().description(name).items():
        if isinstance(value, torch.dtype):
            tensors[key] = Weight(shape, value, partial(_read, shards, name, key))
        elif isinstance(value, torch.Tensor):
            kept = value.clone()  # the file that it is mapped from may be let go of
            tensors[key] = Weight((), kept.dtype, kept.detach)
        else:
            numbers[key] = json.dumps(value)
    return write_tensors(path, tensors, numbers)


def _read(shards: Mapped[Shards], name: str, key: str) -> torch.Tensor:
    size = 4 * shards.opened().shapes[name].numel()
    return shards.opened(size).read_tensor(name, key)


def _identity(checkpoint: Path) -> str:
    return FileChecksum.of(checkpoint / "manifest.json").xxh3_128
