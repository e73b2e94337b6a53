"""The folder of intermediate files, which makes a run resumable: one folder a task, and it exists only when complete.

A task writes into a folder aside; that is fsynced and renamed, with a receipt of counts in it. A run with the same
plan takes what it finds and does the rest. Arrays are stored as their bytes, so that they can be memory-mapped.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.sources import one_line
from megagpt.data.atomic import fsync_path
from megagpt.errors import UserError

Receipt = dict[str, float]
"""Counts of what a task did, such as documents and bytes, and its seconds."""

_RECEIPT, _POSITION = "receipt.json", "position"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # as on Lustre mounted without flock


class BusyError(UserError):
    """Another process works with the same folder."""


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made, with its folder, and removed again.

    A POSIX lock: network file systems show it to other nodes, as they do not with flock's or those of folders.
    BusyError with the message `busy`: another process holds it. OSError: it cannot be made.
    """
    descriptor = _open_locked(path, busy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path, busy: str) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):  # and not removed between opening and locking, by who held it before
                return descriptor
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise BusyError(busy) from None
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def open_workspace(folder: Path) -> Iterator[Path]:
    """`folder`, made if missing, without the remains of killed tasks, and locked for this process.

    UserError: another run works in it, or it cannot be made.
    """
    where = f"work folder {one_line(folder)}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                locked(_lock(folder), f"{where}: another run of the same plan is using it; wait for it")
            )
            _remove_trash(folder)
            folder.mkdir(exist_ok=True)
            for remains in folder.glob("*/.*"):
                shutil.rmtree(remains)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; choose another with --work-dir") from error
        yield folder


def remove_workspace(folder: Path) -> None:
    """Remove the folder, while it is locked; killed in between, no later run takes what is left for results."""
    if folder.exists():
        folder.rename(_trash(folder))
    _remove_trash(folder)


def workspace_exists(folder: Path) -> bool:
    """Whether something of it is there, though it be half removed."""
    return any(path.exists() for path in (folder, _trash(folder), _lock(folder)))


def _remove_trash(folder: Path) -> None:
    if _trash(folder).exists():
        shutil.rmtree(_trash(folder))


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")  # beside it: NFS keeps an open file in a folder that is removed


def _trash(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def disk_error(error: OSError, folder: Path) -> str:
    """What an error of the disk, met while working with `folder`, was, and what to do: the rest of a message."""
    name = f"{one_line(error.filename)}: " if error.filename else ""
    space = f"free space for {one_line(folder)}, and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{name}{error.strerror or error}; {space}run the same command again to go on"


def task_folder(stage: Path, number: int) -> Path:
    """The folder of the result of one task of a stage."""
    return stage / f"{number:06d}"


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt of the finished task of this folder; None if it is not finished."""
    try:
        return json.loads((folder / _RECEIPT).read_bytes())
    except FileNotFoundError:
        return None


def write_folder(folder: Path, write: Callable[[Path], Receipt]) -> Receipt:
    """Let `write` fill a folder aside, then make it `folder`, with the receipt that it returned and its seconds."""
    aside = _aside(folder, os.getpid())
    aside.mkdir(parents=True)
    try:
        start = time.monotonic()
        receipt = write(aside)
        receipt["seconds"] = round(time.monotonic() - start, 3)
        (aside / _RECEIPT).write_text(json.dumps(receipt))
        for parent, _, names in os.walk(aside):
            for name in names:
                fsync_path(Path(parent, name))
            fsync_path(Path(parent))
        aside.rename(folder)
        fsync_path(folder.parent)
    except BaseException:  # an interrupt, too, leaves no half-written folder, and goes on
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return receipt


def is_being_written(folder: Path, process_id: int) -> bool:
    """Whether the process was at work on `folder`, or was when it died."""
    return _aside(folder, process_id).is_dir()


class Position:
    """Tells, while a task writes into `folder`, which document it is at, should its process be killed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _POSITION

    def __enter__(self) -> "Position":
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)
        self._path.unlink()

    def set(self, file: bytes, position: int) -> None:
        """The name of the input file, and where in it the document begins; takes a microsecond or two."""
        os.pwrite(self._descriptor, b"%s, document at position %d\n" % (file, position), 0)


def last_position(folder: Path, process_id: int) -> str | None:
    """Where the process was in its work on `folder`; None: it did not say."""
    try:
        content = (_aside(folder, process_id) / _POSITION).read_bytes()
    except FileNotFoundError:
        return None
    return os.fsdecode(content.partition(b"\n")[0])


def _aside(folder: Path, process_id: int) -> Path:
    return folder.with_name(f".{folder.name}.{os.uname().nodename}.{process_id}")


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array's elements, in C order. OSError: the disk refuses (numpy's own writer would not say why)."""
    with open(path, "wb") as file:
        file.write(np.ascontiguousarray(array).view(np.uint8).data)


def map_array(path: Path, dtype: npt.DTypeLike, columns: int | None = None) -> npt.NDArray[Any]:
    """The elements in a file as a read-only array (elements), or (elements / columns, columns), without reading it."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            array = np.empty(0, dtype)
        else:
            array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    return array if columns is None else array.reshape(-1, columns)
