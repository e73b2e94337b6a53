"""Causal self-attention through torch's SDPA: multi-head, or grouped-query (Ainslie et al. 2023).

One matrix product makes queries, keys and values: its rows are [all query heads | all key heads | all value heads],
and query head h reads key-value head h // (num_attention_heads / num_kv_heads), as in Llama.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.positions import Rotary, apply_rotary


class LayerCache(Protocol):
    """Keys and values of the earlier positions of one layer."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (batch, kv_heads, seq, head_dim); return those of all positions so far."""


class Attention(nn.Module):
    """(batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        qkv_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, qkv_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend to this and all earlier positions, or to those that `mask` (see attention_mask) allows."""
        batch, seq, _ = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        if cache is not None:
            key, value = cache.append(key, value)

        grouped = self.num_kv_heads != self.num_heads
        if grouped and mask is not None:
            # No fused GPU kernel takes a mask and grouped heads together; unfused, SDPA would store seq x seq scores.
            repeats = self.num_heads // self.num_kv_heads
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            grouped = False
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and seq > 1,
            enable_gqa=grouped,
        )
        return self.out(attended.transpose(1, 2).reshape(batch, seq, -1))


def attention_mask(seq_len: int, past_len: int, document_ids: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see: bool (batch or 1, 1, seq_len, past_len + seq_len), True where it may.

    None where the plain causal rule says it all: a sequence from its start, or one new position after cached ones.
    With document_ids (batch, seq_len) a query sees its own document only.
    """
    if document_ids is None and (past_len == 0 or seq_len == 1):
        return None
    causal = torch.ones(seq_len, past_len + seq_len, dtype=torch.bool, device=device).tril(past_len)
    if document_ids is None:
        return causal[None, None]
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
