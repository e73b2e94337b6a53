"""A rank's part of a checkpoint, copied to host memory, so that it can be written while training goes on.

DeepSpeed hands each file's content to its checkpoint engine; the one here keeps copies. Tensors that share a storage
share it in the copy too, as torch.save and DeepSpeed's flat buffers expect. DeepSpeed's own asynchronous engines
(decoupled, fast) write in another process through a compiled writer and leave neither a checksum nor a place for an
fsync before the checkpoint counts. Cost: the host memory of this rank's part, in page-locked memory on GPUs.
"""

import copy
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from megagpt.data.manifest import FileChecksum
from megagpt.training.shards import DEEPSPEED_CLASSES
from megagpt.training.torch_files import read_torch_file

_SLICE = 1 << 26  # bytes: progress is seen within a large tensor, too


class CollectingEngine(TorchCheckpointEngine):
    """Keeps what DeepSpeed saves, for somebody else to write: a disk that fails must not leave ranks in a barrier.

    And reads for DeepSpeed, which by itself would unpickle whatever the files hold.
    """

    def __init__(self, template: TorchCheckpointEngine) -> None:
        self.name = "CollectingEngine"
        self.zipfile_serialization = template.zipfile_serialization
        self.snapshot = False
        """Whether to keep copies, which training cannot change any more."""
        self.contents: dict[Path, Any] = {}
        """Content of each file."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folders are made by whoever writes the files."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the content of the file at `path`."""
        self.contents[Path(path)] = host_copy(state_dict) if self.snapshot else state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of the file at `path`, which holds nothing but data and DeepSpeed's own records."""
        return read_torch_file(Path(path), {name: _imported(name) for name in DEEPSPEED_CLASSES}, map_location)


def _imported(name: str) -> type:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


def host_copy(content: Any) -> Any:
    """A copy of nested containers whose tensors lie in host memory; returns when it is complete."""
    copied = _copied(content, {})
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(content: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(content, Tensor):
        return _copied_tensor(content.detach(), storages)
    if isinstance(content, dict):
        shell = copy.copy(content)  # keeps OrderedDict and others what they are
        for key, value in content.items():
            shell[key] = _copied(value, storages)
        return shell
    if type(content) in (list, tuple):
        return type(content)(_copied(value, storages) for value in content)
    return copy.deepcopy(content)


def _copied_tensor(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        on_gpu = tensor.device.type == "cuda"
        bytes_ = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        host = torch.empty(len(bytes_), dtype=torch.uint8, pin_memory=on_gpu)
        host.copy_(bytes_, non_blocking=on_gpu)
        storages[storage._cdata] = host.untyped_storage()
    offset, size, stride = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(storages[storage._cdata], offset, size, stride)


class _HashingFile:
    """Hashes what is written, so that nothing needs to be read again."""

    def __init__(self, file: BinaryIO, count: Callable[[int], object]) -> None:
        self._file, self._count = file, count
        self._digest, self._size = xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _SLICE):
            part = view[start : start + _SLICE]
            self._file.write(part)
            self._digest.update(part)
            self._size += len(part)
            self._count(len(part))
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def checksum(self) -> FileChecksum:
        return FileChecksum(size=self._size, xxh3_128=self._digest.hexdigest())


def write_file(content: Any, path: Path, count: Callable[[int], object]) -> FileChecksum:
    """torch.save `content` to `path`, fsynced; its checksum. Raises OSError or RuntimeError (a full disk).

    count: called with the number of bytes of each write.
    """
    with open(path, "wb") as file:
        hashing = _HashingFile(file, count)
        torch.save(content, cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
    return hashing.checksum()
