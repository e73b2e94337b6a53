"""A decoder-only transformer (Radford et al. 2019) that covers the GPT-2 and Llama families, chosen by a ModelConfig.

Shapes: tokens (batch, seq) int64 -> hidden states (batch, seq, hidden) -> logits (batch, seq, vocab), or the sum of
losses. Every block is x + attention(norm(x)), then x + feedforward(norm(x)). A tied head reads the token embedding's
weights, so the state dict holds them once. Rows that pad the vocabulary have no logits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import ModelConfig
from megagpt.model.attention import (
    SDPA_KERNELS,
    Attention,
    BlockSparseMask,
    FlexKernel,
    LayerCache,
    attention_mask,
    block_sparse_mask,
)
from megagpt.model.embedding import Embedding
from megagpt.model.feedforward import FeedForward
from megagpt.model.loss import EAGER_KERNELS, linear_cross_entropy
from megagpt.model.norm import build_norm
from megagpt.model.positions import Rotary, position_ids, rotary_tables, sinusoidal_embedding


class Cache(Protocol):
    """Keys and values of earlier positions, and where this call's tokens stand among them."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One a block."""

    @property
    def positions(self) -> Tensor:
        """Of this call's tokens: (batch or 1, seq) int64."""

    @property
    def mask(self) -> Tensor | None:
        """Which of the keys that a layer's `append` returns each query may see; None: see Attention."""


class Block(nn.Module):
    """One transformer layer with pre-normalisation: (batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.feedforward_norm = build_norm(config)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | BlockSparseMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Add attention, then feed-forward, to the residual stream."""
        attended = self.attention(self.attention_norm(hidden_states), rotary, mask, cache)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.feedforward(self.feedforward_norm(hidden_states)))


class GPT(nn.Module):
    """The whole model. Its weights are arbitrary until `initialize_weights` or `load_state_dict`."""

    def __init__(self, config: ModelConfig, checkpointing_every: int = 0) -> None:
        """checkpointing_every: of so many blocks the first recomputes its activations in backward; 0: none does."""
        super().__init__()
        self.config = config
        self.checkpointing_every = checkpointing_every
        self.loss_kernels = EAGER_KERNELS
        self.output_kernel: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.flex_attention = False
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = Embedding(config.max_seq_len, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        last_position_only: bool = False,
    ) -> Tensor:
        """Logits (batch, seq, vocab), or with targets the sum of their cross-entropies (fp32 scalar).

        input_ids, targets: (batch, seq) int64; targets of IGNORE_INDEX (-100) have no loss.
        document_ids: (batch, seq) int; attention and positions stop where it changes. An id must not come again later.
        cache: earlier positions to attend to, and those of this call, which are appended. Not with document_ids.
        last_position_only: logits (batch, 1, vocab) of the last position, which is what decoding needs.
        Raises ValueError for more positions than a learned table has.
        """
        assert cache is None or document_ids is None, "a cache holds one document"
        seq_len = input_ids.shape[1]
        if self.config.position == "learned" and seq_len > self.config.max_seq_len:
            raise ValueError(f"{seq_len} tokens, but only {self.config.max_seq_len} learned positions")
        positions = position_ids(seq_len, document_ids, input_ids.device) if cache is None else cache.positions
        mask: Tensor | BlockSparseMask | None
        # FlexAttention knows no dropout.
        if cache is not None:
            mask = cache.mask
        elif document_ids is not None and self.flex_attention and not (self.training and self.config.dropout):
            mask = block_sparse_mask(document_ids)
        else:
            mask = attention_mask(seq_len, document_ids, input_ids.device)
        rotary = self._rotary_tables(positions)
        hidden_states = self.dropout(self._embed(input_ids, positions))
        for index, block in enumerate(self.blocks):
            recomputes = self.checkpointing_every > 0 and index % self.checkpointing_every == 0
            if recomputes and self.training and cache is None:
                hidden_states = checkpoint(block, hidden_states, rotary, mask, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, rotary, mask, None if cache is None else cache.layers[index])
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        hidden_states = self.norm(hidden_states)
        # The weight is read outside its module's own forward, as an attribute, which is where ZeRO-3 gathers it.
        weight = self.embedding.weight if self.config.tie_embeddings else self.head.weight
        if targets is None:
            return self.output_kernel(hidden_states, weight)[..., : self.config.vocab_size]
        return linear_cross_entropy(
            hidden_states.flatten(0, 1), weight, targets.flatten(), self.loss_kernels, self.config.vocab_size
        )

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        embedded = self.embedding(input_ids)
        if self.config.position == "learned":
            return embedded + self.position_embedding(positions)
        if self.config.position == "sinusoidal":
            # Scaled as in the paper, or sines of amplitude 1 would drown embeddings of 0.02.
            scaled = embedded.float() * math.sqrt(self.config.hidden_size)
            return (scaled + sinusoidal_embedding(positions, self.config.hidden_size)).to(embedded.dtype)
        return embedded

    def _rotary_tables(self, positions: Tensor) -> Rotary | None:
        if self.config.position != "rope":
            return None
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)


def compile_blocks(model: GPT) -> None:
    """Compile the block in place at its first use, once for all layers."""
    for block in model.blocks:
        block.compile()


def compile_model(model: GPT) -> None:
    """Compile all that `forward` does, the loss too, as one graph at its first use, but not the module's hooks.

    A copy of the model would have this one's `forward`: not to be copied or pickled afterwards.
    """
    model.forward = torch.compile(model.forward, fullgraph=True)  # type: ignore[method-assign]


def compile_attention(model: GPT) -> None:
    """Keep documents apart by FlexAttention from now on, which is compiled at its first use, within blocks or alone."""
    use_flex_attention(model, torch.compile(flex_attention))


def use_sdpa_kernel(model: GPT, kernel: str) -> None:
    """Train by one of SDPA_KERNELS from now on."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.sdpa_kernel = SDPA_KERNELS[kernel]


def use_flex_attention(model: GPT, kernel: FlexKernel) -> None:
    """Keep documents apart by `kernel` from now on; uncompiled it stores all scores, and on CPUs has no backward."""
    model.flex_attention = True
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.flex_kernel = kernel


def compile_loss(model: GPT) -> None:
    """Compile the loss of a chunk in place at its first use."""
    model.loss_kernels = EAGER_KERNELS.compiled()
