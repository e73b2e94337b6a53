"""A model's weights by parameter name, each read when it is asked for: out of DeepSpeed's shards, and as a type.

DeepSpeed's own zero_to_fp32 does the same for checkpoints but for bf16 at stage 1, whose files it does not recognise.
The shards are memory-mapped, so the optimizer's moments are never read; mapped pages count as memory of the process, so
the files are opened anew after some of it, which lets go of them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from megagpt.config.schema import ModelConfig
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.init import VOCABULARY_WEIGHTS
from megagpt.training.shards import Shards, load_file

MAPPED_BYTES = 1 << 27
"""Read from a memory-mapped file before it is opened anew."""

OpenedT = TypeVar("OpenedT")


class Weight(NamedTuple):
    """A tensor that lies somewhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """Its values on the CPU, not to be changed: they may be memory-mapped."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Weights = Mapping[str, Weight]


class Mapped(Generic[OpenedT]):
    """Something memory-mapped, let go of after `limit` bytes were read of it and opened anew: so as not to grow.

    limit: default MAPPED_BYTES. reopens: False for what is held in memory, whole.
    """

    def __init__(self, open_: Callable[[], OpenedT], limit: int | None = None, reopens: bool = True) -> None:
        self._open, self._reopens, self._limit = open_, reopens, limit
        self._left = self._allowed
        self._opened: OpenedT | None = None

    def opened(self, nbytes: int = 0) -> OpenedT:
        """For a caller who is about to read so much of it, and keeps no reference to it."""
        found = self._open() if self._opened is None else self._opened
        self._left -= nbytes
        self._opened = found
        if self._reopens and self._left < 0:
            self._opened, self._left = None, self._allowed
        return found

    @property
    def _allowed(self) -> int:
        return MAPPED_BYTES if self._limit is None else self._limit


def open_weights(shards: Path, zero_stage: int, world_size: int) -> dict[str, Weight]:
    """The fp32 master weights in the folder `shards`, which `world_size` ranks wrote at `zero_stage`.

    Raises UserError, now and while reading, if a file is missing or damaged.
    """
    if zero_stage == 0:
        name = "mp_rank_00_model_states.pt"
        whole = Mapped(lambda: load_file(shards, name)["module"])
        shapes = {name: tensor.shape for name, tensor in whole.opened().items()}

        def read(name: str, nbytes: int) -> torch.Tensor:
            return whole.opened(nbytes)[name].float()

    else:
        cut = Mapped(lambda: Shards(shards, zero_stage, world_size))
        shapes = cut.opened().shapes

        def read(name: str, nbytes: int) -> torch.Tensor:
            return cut.opened(nbytes).read_weight(name)

    return {
        name: Weight(tuple(shape), torch.float32, partial(read, name, 4 * shape.numel()))
        for name, shape in shapes.items()
    }


def without_padding(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The same model without the rows that pad its vocabulary."""
    if model.padded_vocab_size == model.vocab_size:
        return model.without_padding(), weights
    found, rows = dict(weights), model.vocab_size
    for name in VOCABULARY_WEIGHTS & weights.keys():
        weight = weights[name]
        if weight.shape[:1] == (model.padded_vocab_size,):
            found[name] = Weight((rows, *weight.shape[1:]), weight.dtype, partial(_first_rows, weight, rows))
    return model.without_padding(), found


def _first_rows(weight: Weight, rows: int) -> torch.Tensor:
    return weight.read()[:rows]


def check_weights(weights: Weights, model: ModelConfig, where: str) -> None:
    """Raises UserError unless these are the weights of `model`: their names and shapes."""
    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in GPT(model).named_parameters()}
    for name in sorted(expected.keys() ^ weights.keys()):
        state = "has no" if name in expected else "has an unknown"
        raise UserError(f"{where}: {state} weight {name}; it is damaged, or of another program or version")
    for name, shape in expected.items():
        if (found := weights[name].shape) != shape:
            raise UserError(f"{where}: weight {name} has shape {found} instead of {shape}; it is damaged")


def read_weights(shards: Path, zero_stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """All of `open_weights` at once, in memory of their own."""
    return {name: weight.read().clone() for name, weight in open_weights(shards, zero_stage, world_size).items()}
