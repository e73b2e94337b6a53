"""Tensors into a safetensors file, one in memory at a time.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of length, a header in JSON, the tensors
one after another. The library's own save_file wants all of a file's tensors at once.
"""

import json
import os
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash

from megagpt.data.manifest import FileChecksum
from megagpt.training.weights import Weights

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}


def write_tensors(
    path: Path, tensors: Weights, metadata: Mapping[str, str], report: Callable[[int], object] = lambda size: None
) -> FileChecksum:
    """Write `tensors` in their order to a safetensors file with this metadata, fsynced; its checksum. Raises OSError.

    report: is told the bytes of each tensor once it is written.
    """
    ends = accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for (name, tensor), offsets in zip(tensors.items(), pairwise(ends), strict=True):
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text
    digest, size = xxhash.xxh3_128(beginning), len(beginning)
    with open(path, "wb") as file:
        file.write(beginning)
        for tensor in tensors.values():
            value = tensor.read()
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype)
            content = value.contiguous().flatten().view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
            size += tensor.nbytes
            report(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return FileChecksum(size=size, xxh3_128=digest.hexdigest())
