"""Keys and values of the positions seen so far, so that decoding computes each position once.

Memory is taken once: per layer two tensors (batch, kv_heads, max_len + 1, head_dim), in which every row has its own
length. Grouped-query models keep their few key-value heads only. Position p of a row lies in column p modulo max_len:
a row that goes on beyond max_len writes over its oldest position and sees the last max_len ones. Keys and values
take the cache's dtype, which under autocast may be another.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.config.schema import ModelConfig


class _Decoding(NamedTuple):
    """One layer, while each row adds its next positions."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    """(batch, 1)."""
    columns: Tensor
    """(batch, seq)."""
    limit: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (batch, kv_heads, seq, head_dim) in its columns; return views of the first `limit` columns."""
        self.keys[self.rows, :, self.columns] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.columns] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : self.limit], self.values[:, :, : self.limit]


class _Prefilling(NamedTuple):
    """One layer, while prompts are read from their beginning."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    """(n,)."""
    prompts: Tensor
    """(n,): which of the prompts each row has."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copy (prompts, kv_heads, seq, head_dim) into the rows; return it."""
        self.keys[self.rows, :, : keys.shape[2]] = keys[self.prompts].to(self.keys.dtype)
        self.values[self.rows, :, : keys.shape[2]] = values[self.prompts].to(self.values.dtype)
        return keys, values


class CacheView(NamedTuple):
    """What a forward pass takes: see megagpt.model.gpt.Cache."""

    layers: list[_Decoding] | list[_Prefilling]
    positions: Tensor
    mask: Tensor | None


class KVCache:
    """The keys and values of all layers. Which of them count, the positions say that are given to `at`."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers
        keys, _ = layers[0]
        self._rows = torch.arange(keys.shape[0], device=keys.device).unsqueeze(1)
        self._columns = torch.arange(keys.shape[2] - 1, device=keys.device)
        self._first_columns: dict[int, Tensor] = {}

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Room for `max_len` positions of `batch` sequences."""
        # A column more than is ever looked at: to look at all would be another case for a compiler.
        shape = (batch, config.kv_heads, max_len + 1, config.head_dim)
        # Zeros, as what is masked is multiplied by 0, which would not hide a NaN.
        return cls([tuple(torch.zeros(2, *shape, device=device, dtype=dtype)) for _ in range(config.num_layers)])

    @property
    def max_len(self) -> int:
        """The most positions that a row can see."""
        return len(self._columns)

    def columns(self, limit: int) -> Tensor:
        """The first `limit` columns as `at` takes them: (limit,) int64, the same tensor each time."""
        if limit not in self._first_columns:
            self._first_columns[limit] = torch.arange(limit, device=self._columns.device)
        return self._first_columns[limit]

    def at(self, positions: Tensor, seen: Tensor) -> CacheView:
        """To read tokens at `positions` (batch, seq) int64, each row after its earlier ones.

        seen: the first columns, of which all positions up to max_len are, so that no more need be looked at. Several
        positions at a time (seq > 1) must be below max_len.
        """
        columns = positions % self.max_len
        mask = (seen <= positions.unsqueeze(-1)).unsqueeze(1)
        layers = [_Decoding(keys, values, self._rows, columns, len(seen)) for keys, values in self.layers]
        return CacheView(layers, positions, mask)

    def prefill(self, rows: Tensor, prompts: Tensor, seq_len: int) -> CacheView:
        """To read prompts (n, seq_len) from position 0: rows[i] gets the keys and values of prompt prompts[i] (m,).

        Prompts may be padded on the right: what padding leaves behind is written over before it is seen.
        """
        positions = self._columns[:seq_len].unsqueeze(0)
        return CacheView([_Prefilling(keys, values, rows, prompts) for keys, values in self.layers], positions, None)
