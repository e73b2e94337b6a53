"""Keys and values of the positions seen so far, so that decoding computes each position once.

Memory is taken once, for the longest sequence: per layer two tensors (batch, kv_heads, max_len, head_dim). Grouped-
query models keep their few key-value heads only.
"""

import torch
from torch import Tensor

from megagpt.config.schema import ModelConfig


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys, self.values, self.length = keys, values, length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (batch, kv_heads, seq, head_dim); return views of those of all positions so far."""
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.keys.shape[2], "the caller sized the cache for the whole sequence"
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """The caches of all layers; `length` positions are filled."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Room for `max_len` positions of `batch` sequences."""
        shape = (batch, config.kv_heads, max_len, config.head_dim)
        return cls(
            [
                LayerCache(
                    torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
                )
                for _ in range(config.num_layers)
            ]
        )

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self.layers[0].length

    def repeated(self, batch: int) -> "KVCache":
        """A copy for `batch` continuations of the one sequence held here."""
        return KVCache(
            [
                LayerCache(layer.keys.repeat(batch, 1, 1, 1), layer.values.repeat(batch, 1, 1, 1), layer.length)
                for layer in self.layers
            ]
        )
