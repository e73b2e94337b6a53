"""What forward keeps for backward, by layer type, and what both need for the moment.

Counted are the tensors that autograd saves of megagpt.model, each storage once (the values that attention reads keep
the whole product of queries, keys and values alive), with attention that stores no scores (flash). torch.compile saves
the same but for the product of SwiGLU's gate, which it computes anew. Mixed precision without ZeRO (autocast) has an
fp32 residual stream and 16-bit copies of the blocks' weights. Masks of documents are not counted.
"""

from dataclasses import dataclass
from typing import Literal

from megagpt.config.schema import ModelConfig
from megagpt.model.loss import chunk_tokens_of
from megagpt.planning.layout import Layout
from megagpt.planning.states import element_bytes

Kernels = Literal["cuda", "cpu"]
"""A CPU's RMSNorm keeps fp32 copies; LayerNorm's statistics and dropout's masks have the input's format there."""

_FP32 = 4
_EAGER_LOSS = 3
"""fp32 values a logit that the uncompiled loss has at once: logits, less their normalizer, and exponentiated."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank and one micro-batch."""

    embedding: int
    norms: int
    attention: int
    feedforward: int
    checkpoints: int
    """Inputs of the blocks, with checkpointing."""
    loss: int
    """Gradients of the last hidden states and of the head's weight (fp32), which forward computes."""
    recomputed: int
    """What a block computes anew for its backward, with checkpointing."""
    recomputed_last: int
    """The same of the last block, if it does: in the sizes of the three layer types, but not kept from forward."""
    forward_moment: int
    """What the loss takes while it is computed: logits and a product."""
    loss_backward_moment: int
    """What the loss takes while its gradients are handed on."""
    block_backward_moment: int
    """Gradients within a block, about; and of a tied head, which wait for the embedding's."""

    @property
    def saved(self) -> int:
        """Kept from forward to backward."""
        layers = self.norms + self.attention + self.feedforward - self.recomputed_last
        return self.embedding + layers + self.checkpoints + self.loss


def activations(model: ModelConfig, layout: Layout, kernels: Kernels = "cuda") -> Activations:
    """Of a rank under `layout`."""
    tokens, size, hidden = layout.micro_batch * layout.seq_len, element_bytes(layout), model.hidden_size
    stream = tokens * hidden * (_FP32 if layout.zero_stage == 0 else size)
    compiled = layout.compile and layout.zero_stage < 3
    norms = 2 * _norm(model, layout, kernels, compiled)
    if compiled:  # keeps the 16-bit output of attention, and adds it to the block's input anew
        norms -= stream - size * tokens * hidden
    residual_mask, embedding_mask = (
        tokens * hidden * (1 if kernels == "cuda" else width) if model.dropout else 0
        for width in (size, stream // (tokens * hidden))
    )
    attention = _attention(model, tokens, size) + residual_mask
    feedforward = _feedforward(model, layout, compiled) + residual_mask
    checkpointed = layout.checkpointed_blocks(model.num_layers)
    # Backward begins with the last block; what it computes anew comes on top of what the others have kept.
    last_anew = checkpointed > layout.checkpointed_blocks(model.num_layers - 1)
    alive = model.num_layers - checkpointed + last_anew
    block = norms + attention + feedforward
    head = model.padded_vocab_size * hidden
    chunk_tokens = min(chunk_tokens_of(model.padded_vocab_size, kernels), tokens)
    chunk = chunk_tokens * model.padded_vocab_size
    # The products of several chunks are summed in fp32, beside the last one; fp16 is never left alone.
    summed = chunk_tokens < tokens or layout.precision == "fp16"
    weight_size = _FP32 if layout.zero_stage == 0 else size
    widest = (3 if model.activation == "swiglu" else 2) * size * tokens * model.ffn_size
    return Activations(
        embedding=_embedding(model, layout) + embedding_mask,
        norms=alive * norms + _norm(model, layout, kernels, fused=False),
        attention=alive * attention,
        feedforward=alive * feedforward,
        checkpoints=checkpointed * stream,
        loss=size * tokens * hidden + (_FP32 if summed else size) * head,
        recomputed=block if checkpointed else 0,
        recomputed_last=block if last_anew else 0,
        forward_moment=size * (chunk + head * (summed + (weight_size != size)))
        + (0 if layout.compile else _EAGER_LOSS * _FP32 * chunk),
        loss_backward_moment=stream + (weight_size + (0 if layout.compile else _FP32)) * head,
        block_backward_moment=2 * stream + widest + (weight_size * head if model.tie_embeddings else 0),
    )


def weight_copies(model: ModelConfig, layout: Layout) -> int:
    """Bytes of the 16-bit copies of the blocks' matrices and biases that mixed precision without ZeRO makes."""
    if layout.zero_stage > 0 or layout.precision == "fp32":
        return 0
    hidden, widenings = model.hidden_size, 2 if model.activation == "swiglu" else 1
    qkv = hidden + 2 * model.kv_heads * model.head_dim
    matrices = hidden * (qkv + hidden) + (widenings + 1) * hidden * model.ffn_size
    return 2 * model.num_layers * matrices


def _embedding(model: ModelConfig, layout: Layout) -> int:
    """int64 ids, and positions where a table is looked up; rotary tables."""
    ids = 8 * layout.micro_batch * layout.seq_len
    if model.position == "learned":
        return ids + 8 * layout.seq_len
    return ids + (2 * _FP32 * layout.seq_len * model.head_dim if model.position == "rope" else 0)


def _norm(model: ModelConfig, layout: Layout, kernels: Kernels, fused: bool) -> int:
    """The input and its statistics; the output is the next layer's input and counted there."""
    tokens = layout.micro_batch * layout.seq_len
    size = _FP32 if layout.zero_stage == 0 else element_bytes(layout)
    if model.norm == "layernorm":
        return tokens * (size * model.hidden_size + 2 * (_FP32 if kernels == "cuda" else size))
    if kernels == "cuda" or fused:
        return tokens * (size * model.hidden_size + _FP32)
    return tokens * (2 * _FP32 * model.hidden_size + _FP32)


def _attention(model: ModelConfig, tokens: int, size: int) -> int:
    """Input, queries, keys and values, rotated ones beside them, output, and fp32 sums of the softmax."""
    queries, keys = model.hidden_size, model.kv_heads * model.head_dim
    rotated = queries + keys if model.position == "rope" else 0
    elements = model.hidden_size + queries + 2 * keys + rotated + model.hidden_size
    return tokens * (size * elements + _FP32 * model.num_attention_heads)


def _feedforward(model: ModelConfig, layout: Layout, compiled: bool) -> int:
    """Input, what goes into the activation, and what comes out of it."""
    tokens, size = layout.micro_batch * layout.seq_len, element_bytes(layout)
    inputs, inner = 1, 2
    if model.activation == "swiglu":
        inner = 3 if compiled else 4
        cast_twice = layout.zero_stage == 0 and layout.precision != "fp32" and not compiled
        inputs = 2 if cast_twice else 1  # once for each of the two products
    return tokens * size * (inputs * model.hidden_size + inner * model.ffn_size)
