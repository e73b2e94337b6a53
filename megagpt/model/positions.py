"""Positions: numbering of tokens, fixed sines (Vaswani et al. 2017), rotary embedding (Su et al. 2021).

Tables are computed in fp32 from integer positions at every forward pass. They are no buffers, which casting a model
to bf16 would round to 8 bits; beside the blocks their cost is small. The rotary layout is Hugging Face's: dimension i
is rotated with dimension i + head_dim / 2, so Llama weights convert by a plain copy.
"""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, fp32, each (batch or 1, 1, seq, head_dim): broadcast over heads."""


def position_ids(seq_len: int, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Positions (batch or 1, seq) int64: 0, 1, ...; with document_ids from 0 in each document."""
    index = torch.arange(seq_len, device=device).unsqueeze(0)
    return index if document_ids is None else index - document_starts(document_ids)


def document_starts(document_ids: Tensor) -> Tensor:
    """Index of the first token of each token's document: ids (batch, seq) int -> (batch, seq) int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_start, index, 0).cummax(dim=1).values


def sinusoidal_embedding(positions: Tensor, hidden_size: int) -> Tensor:
    """Sines in even and cosines in odd dimensions: positions (batch, seq) -> (batch, seq, hidden_size) fp32."""
    angles = _angles(positions, hidden_size, base=10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of every rotation angle: positions (batch, seq) -> two of (batch, 1, seq, head_dim) fp32."""
    angles = _angles(positions, head_dim, base=theta).unsqueeze(1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys (batch, heads, seq, head_dim) by their angles, in the tables' fp32; returns x's dtype."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def _angles(positions: Tensor, dim: int, base: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
    return positions.unsqueeze(-1).float() * (1.0 / base**exponents)
