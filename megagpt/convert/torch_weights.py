"""Weights in files that torch.save wrote, read as data, one tensor at a time."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagpt.errors import UserError
from megagpt.training.torch_files import read_torch_file
from megagpt.training.weights import Mapped, Weight

Pick = Callable[[Any], Mapping[str, torch.Tensor]]
"""Where in a file's content the tensors are."""


def read_torch_weights(
    files: Sequence[Path], pick: Pick = lambda content: content, classes: Mapping[str, type] | None = None
) -> dict[str, Weight]:
    """The tensors of all files by name, those of integers (masks) left out. classes: as for `read_torch_file`.

    Memory-mapped, but for files of torch before 1.6, which are held whole. Raises UserError for what is no file of
    tensors, and for a name that comes twice.
    """
    weights: dict[str, Weight] = {}
    for path in files:
        mapped = Mapped(partial(_read, path, pick, classes), reopens=zipfile.is_zipfile(path))
        for name, tensor in mapped.opened().items():
            if name in weights:
                raise UserError(f"{path}: has weight {name}, which a file beside it has, too; remove one of them")
            if tensor.is_floating_point():
                weights[name] = Weight(tuple(tensor.shape), tensor.dtype, partial(_read_tensor, mapped, name))
    return weights


def _read(path: Path, pick: Pick, classes: Mapping[str, type] | None) -> Mapping[str, torch.Tensor]:
    content = read_torch_file(path, classes)
    try:
        tensors = pick(content)
    except (KeyError, TypeError, AttributeError):
        tensors = None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds other things than tensors by name; it is no file of weights")
    return tensors


def _read_tensor(mapped: Mapped[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    return mapped.opened(mapped.opened()[name].nbytes)[name]
