"""Writing checkpoints: complete or absent, while training goes on.

    begin   all ranks: the state is copied to host memory (or, synchronously, referred to): the stall of a save
    write   a thread of each rank: its files go to a hidden folder, hashed as they are written, fsynced
    finish  all ranks, once all have written: sizes are compared, the manifest lists every file, the folder is renamed
            and only then named by `latest`; older checkpoints beyond `keep` go, their files in a thread

Killed anywhere in between, a hidden folder remains that nothing reads and the next save removes. A rank that cannot
write (full disk) makes the save fail on all, with older checkpoints untouched.
"""

import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.utils.zero_to_fp32
import numpy as np
import torch
import torch.distributed as dist

from megagpt.data.atomic import fsync_path, replace_file
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.checkpoint import (
    DAMAGED,
    REPLACED,
    SHARDS,
    CheckpointManifest,
    checkpoint_name,
    complete_checkpoints,
)
from megagpt.training.collective import together
from megagpt.training.snapshot import write_file

logger = logging.getLogger(__name__)

RANDOM_STATES = "random"

Collect = Callable[[Path], dict[Path, Any]]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete on disk."""

    path: Path
    step: int
    seconds: float
    """From the beginning of the save to the end."""
    stall_seconds: float
    """Of these, how long training stood still."""
    size: int
    """Bytes of all files."""


class CheckpointWriter:
    """Writes one checkpoint at a time into `folder` (run_dir/checkpoints); `begin` and `finish` are collective."""

    def __init__(self, folder: Path, keep: int) -> None:
        """keep: number of newest checkpoints to keep."""
        self._folder, self._keep = folder, keep
        self._rank = dist.get_rank()
        self._thread: threading.Thread | None = None
        self._removal: threading.Thread | None = None
        self._manifest: CheckpointManifest | None = None
        self._written: dict[str, FileChecksum] = {}
        self._expected: set[str] = set()
        self._failure: str | None = None
        self._started = self._stall = 0.0
        self._bytes = 0

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not finished."""
        return self._manifest is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, manifest: CheckpointManifest, collect: Collect) -> None:
        """Start to write the checkpoint that `manifest` describes.

        `collect(folder)` is called on all ranks and returns the content of each file that this rank is to write below
        that folder; nothing may change these contents before `finish`. Raises AgreedError if the disk refuses.
        """
        assert not self.pending, "one save at a time"
        self._started = time.perf_counter()
        aside = self._aside(manifest)
        together(lambda: self._prepare(aside) if self._rank == 0 else None)
        contents = collect(aside)
        contents[aside / RANDOM_STATES / f"rank_{self._rank:05d}.pt"] = random_states()
        self._manifest, self._written, self._failure = manifest, {}, None
        self._thread = threading.Thread(target=self._write, args=(aside, contents), name="checkpoint", daemon=True)
        self._thread.start()
        self._stall = time.perf_counter() - self._started

    def finish(self, beat: Callable[[], object]) -> SavedCheckpoint:
        """Wait for all ranks' files and make them a checkpoint. Raises AgreedError if any could not be written.

        beat: called again and again while this rank's writing makes progress.
        """
        assert self._manifest is not None
        assert self._thread is not None
        waited_from = time.perf_counter()
        manifest, self._manifest = self._manifest, None
        while self._thread.is_alive():
            before = self._bytes
            self._thread.join(timeout=1.0)
            if self._bytes > before:
                beat()
        self._thread = None
        try:
            together(self._check)
            parts: list[dict[str, FileChecksum]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self._written)
            files = {name: record for part in parts for name, record in part.items()}
            whole = manifest.model_copy(update={"files": files})
            together(lambda: self._publish(whole) if self._rank == 0 else None)
        except UserError:
            if self._rank == 0:
                shutil.rmtree(self._aside(manifest), ignore_errors=True)
            raise
        now = time.perf_counter()
        return SavedCheckpoint(
            self._folder / checkpoint_name(manifest.step),
            manifest.step,
            now - self._started,
            self._stall + now - waited_from,
            sum(record.size for record in files.values()),
        )

    def close(self) -> None:
        """Wait until what the last checkpoint superseded is removed."""
        if self._removal:
            self._removal.join()
            self._removal = None

    def _aside(self, manifest: CheckpointManifest) -> Path:
        return self._folder / f".saving_{checkpoint_name(manifest.step)}"

    def _prepare(self, aside: Path) -> None:
        """An empty hidden folder; what killed saves and removals have left is cleared away."""
        self.close()
        try:
            for leftover in (*self._folder.glob(".saving_*"), *self._folder.glob(".removing_*")):
                shutil.rmtree(leftover, ignore_errors=leftover != aside)
            (aside / SHARDS).mkdir(parents=True)
            (aside / RANDOM_STATES).mkdir()
        except OSError as error:
            raise self._refused(error) from error

    def _write(self, aside: Path, contents: dict[Path, Any]) -> None:
        """This rank's files, in the thread; what goes wrong is told in `finish`."""
        try:
            self._expected = {path.relative_to(aside).as_posix() for path in contents}
            for path, content in contents.items():
                self._written[path.relative_to(aside).as_posix()] = write_file(content, path, self._count)
            if self._rank == 0:  # DeepSpeed's own recovery tool, for use without this project
                tool = aside / "zero_to_fp32.py"
                shutil.copyfile(deepspeed.utils.zero_to_fp32.__file__, tool)
                fsync_path(tool)
                self._written[tool.name] = FileChecksum.of(tool)
        except Exception as error:  # noqa: BLE001 - whatever it was, the main thread must hear of it
            for path in contents:
                path.unlink(missing_ok=True)  # a full disk is needed by others, the metrics among them
            self._failure = str(self._refused(error))
        finally:
            contents.clear()

    def _count(self, size: int) -> None:
        self._bytes += size

    def _check(self) -> None:
        if self._failure:
            raise UserError(self._failure)
        assert self._expected <= self._written.keys(), "the thread ended without a word"

    def _publish(self, manifest: CheckpointManifest) -> None:
        aside, final = self._aside(manifest), self._folder / checkpoint_name(manifest.step)
        try:
            for name, record in manifest.files.items():
                if (aside / name).stat().st_size != record.size:
                    raise OSError(f"{name} has another size than was written")
            replace_file(aside / "manifest.json", (manifest.model_dump_json(indent=1) + "\n").encode())
            for folder in (SHARDS, RANDOM_STATES):
                fsync_path(aside / folder)
            if final.exists():
                os.rename(final, self._folder / f"{REPLACED}{final.name}")
            os.rename(aside, final)
            fsync_path(self._folder)
            replace_file(self._folder / "latest", f"{final.name}\n".encode())
        except OSError as error:
            raise self._refused(error) from error
        self._clear_away(final)

    def _clear_away(self, final: Path) -> None:
        """Remove older checkpoints beyond `keep`, and all that only they were of use to.

        They are renamed here and removed while training goes on, as a disk may take a second for a few GB. If that is
        killed, the next save removes what is left.
        """
        older = [path for path in complete_checkpoints(self._folder) if path != final]
        superseded = older[: max(0, len(older) - self._keep + 1)]
        for pattern in (f"{REPLACED}*", f"{DAMAGED}*", ".universal_*", ".converting_*"):
            superseded += self._folder.glob(pattern)
        try:
            doomed = [_doomed(path) for path in superseded]
        except OSError as error:  # the checkpoint is complete; the next one clears away what is left
            logger.warning("cannot remove what %s supersedes: %s", final, error)
            return
        self._removal = threading.Thread(target=_remove, args=(doomed,), name="removal")
        self._removal.start()

    def _refused(self, error: Exception) -> UserError:
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return UserError(f"cannot write a checkpoint into {self._folder}: {reason} ({free:.1f} GB free there)")


def _doomed(path: Path) -> Path:
    """The folder by another name, so that a half-removed one never looks like a checkpoint."""
    return path.rename(path.with_name(f".removing_{path.name.lstrip('.')}"))


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # the next save clears away what is left
            logger.warning("cannot remove %s: %s", folder, error)


def random_states() -> dict[str, Any]:
    """The states of this process's random generators: Python's, numpy's, torch's on CPU and GPU."""
    version, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(checkpoint: Path, rank: int) -> None:
    """Continue the generators where `random_states` found them. Dropout does not depend on it: see trainer.py."""
    path = checkpoint / RANDOM_STATES / f"rank_{rank:05d}.pt"
    states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    version, keys, *rest = states["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
