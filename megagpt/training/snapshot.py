"""A rank's part of a checkpoint, copied to host memory, so that it can be written while training goes on.

DeepSpeed hands each file's content to its checkpoint engine; the one here keeps copies. Tensors that share a storage
share it in the copy too, as torch.save and DeepSpeed's flat buffers expect. DeepSpeed's own asynchronous engines
(decoupled, fast) write in another process through a compiled writer and leave neither a checksum nor a place for an
fsync before the checkpoint counts. Cost: the host memory of this rank's part, page-locked on GPUs, from the first such
save on: memory that was never touched takes several times as long to copy to.
"""

import copy
import importlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from megagpt.data.manifest import FileChecksum
from megagpt.training.shards import DEEPSPEED_CLASSES
from megagpt.training.torch_files import read_torch_file

_SLICE = 1 << 25  # bytes: within a large tensor, too, progress is seen and what was written is synced


class CollectingEngine(TorchCheckpointEngine):
    """Keeps what DeepSpeed saves, for somebody else to write: a disk that fails must not leave ranks in a barrier.

    And reads for DeepSpeed, which by itself would unpickle whatever the files hold.
    """

    def __init__(self, template: TorchCheckpointEngine) -> None:
        self.name = "CollectingEngine"
        self.zipfile_serialization = template.zipfile_serialization
        self.contents: dict[Path, Any] = {}
        """Content of each file."""
        self._snapshot, self._memory = False, HostMemory()

    def begin(self, snapshot: bool) -> None:
        """A save begins; the contents of the last one are not needed any more.

        snapshot: whether to keep copies, which training cannot change any more.
        """
        self._snapshot, self.contents = snapshot, {}
        if snapshot:
            self._memory.reuse()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folders are made by whoever writes the files."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the content of the file at `path`."""
        self.contents[Path(path)] = host_copy(state_dict, self._memory) if self._snapshot else state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of the file at `path`, which holds nothing but data and DeepSpeed's own records."""
        return read_torch_file(Path(path), {name: _imported(name) for name in DEEPSPEED_CLASSES}, map_location)


def _imported(name: str) -> type:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


class HostMemory:
    """Storages in host memory, handed out save after save; what a save has no use for is freed."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}
        self._used: dict[int, list[torch.UntypedStorage]] = defaultdict(list)

    def reuse(self) -> None:
        """All storages that were handed out may be handed out again."""
        self._free, self._used = self._used, defaultdict(list)

    def storage(self, size: int, pinned: bool) -> torch.UntypedStorage:
        """A storage of so many bytes, of any content; all are pinned or none."""
        kept = self._free.get(size)
        found = kept.pop() if kept else torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self._used[size].append(found)
        return found


def host_copy(content: Any, memory: HostMemory) -> Any:
    """A copy of nested containers whose tensors lie in host memory; returns when it is complete."""
    copied = _copied(content, {}, memory)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(content: Any, storages: dict[int, torch.UntypedStorage], memory: HostMemory) -> Any:
    if isinstance(content, Tensor):
        return _copied_tensor(content.detach(), storages, memory)
    if isinstance(content, dict):
        shell = copy.copy(content)  # keeps OrderedDict and others what they are
        for key, value in content.items():
            shell[key] = _copied(value, storages, memory)
        return shell
    if type(content) in (list, tuple):
        return type(content)(_copied(value, storages, memory) for value in content)
    return copy.deepcopy(content)


def _copied_tensor(tensor: Tensor, storages: dict[int, torch.UntypedStorage], memory: HostMemory) -> Tensor:
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        on_gpu = tensor.device.type == "cuda"
        bytes_ = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        storages[storage._cdata] = memory.storage(len(bytes_), on_gpu)
        host = torch.empty(0, dtype=torch.uint8).set_(storages[storage._cdata])
        host.copy_(bytes_, non_blocking=on_gpu)
    offset, size, stride = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(storages[storage._cdata], offset, size, stride)


class _HashingFile:
    """Hashes what is written, which thus need not be read again, and syncs it in a thread while more is written."""

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor, count: Callable[[int], object]) -> None:
        self._file, self._thread, self._count = file, thread, count
        self._digest, self._size = xxhash.xxh3_128(), 0
        self._sync: Future[None] | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _SLICE):
            part = view[start : start + _SLICE]
            self._file.write(part)
            if len(part) == _SLICE and (self._sync is None or self._succeeded(self._sync)):
                self._sync = self._thread.submit(os.fdatasync, self._file.fileno())
            self._digest.update(part)
            self._size += len(part)
            self._count(len(part))
        return len(view)

    @staticmethod
    def _succeeded(sync: Future[None]) -> bool:
        return sync.done() and sync.exception() is None

    def flush(self) -> None:
        self._file.flush()

    def end_sync(self) -> None:
        """Wait for the thread. OSError: the disk refused; it says so only once, to one sync."""
        if self._sync:
            self._sync.result()

    def checksum(self) -> FileChecksum:
        return FileChecksum(size=self._size, xxh3_128=self._digest.hexdigest())


def write_file(content: Any, path: Path, count: Callable[[int], object]) -> FileChecksum:
    """torch.save `content` to `path`, fsynced; its checksum. Raises OSError or RuntimeError (a full disk).

    count: called with the number of bytes of each write.
    """
    with open(path, "wb") as file, ThreadPoolExecutor(1, "sync") as thread:
        hashing = _HashingFile(file, thread, count)
        torch.save(content, cast(IO[bytes], hashing))
        file.flush()
        hashing.end_sync()
        os.fsync(file.fileno())
    return hashing.checksum()
