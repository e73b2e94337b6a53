"""What one GPU has to do in a training step: operations, bytes of memory traffic, bytes through links; no times yet.

Everything is counted for one micro-step (forward and backward of one micro-batch) of the busiest pipeline stage, split
over the layout's tensor- and context-parallel GPUs. A product (rows, inner, columns) is 2 x rows x inner x columns
operations, and backward has two of the same size.
"""

from dataclasses import dataclass

from megagpt.config.schema import ModelConfig
from megagpt.model.counts import parameter_count
from megagpt.planning.layout import Layout

WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
"""Bytes of an activation's or weight's element by the precision of the products; fp8 is a format of products only."""


@dataclass(frozen=True)
class Product:
    """One matrix product: (rows, inner) @ (inner, columns)."""

    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        """Operations of it."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def elements(self) -> float:
        """Elements read and written at least."""
        return self.rows * self.inner + self.inner * self.columns + self.rows * self.columns


def stage_layers(model: ModelConfig, layout: Layout) -> float:
    """Blocks of the fullest pipeline stage."""
    parts = layout.pipeline * layout.virtual_pipeline
    return -(-model.num_layers // parts) * layout.virtual_pipeline


def tokens(layout: Layout) -> float:
    """Tokens of a micro-batch that one GPU has: its part of the sequence."""
    return layout.micro_batch * layout.seq_len / layout.context


def block_products(model: ModelConfig, layout: Layout) -> tuple[Product, ...]:
    """Forward of one block without attention's scores."""
    rows, split, hidden, ffn = tokens(layout), layout.tensor, model.hidden_size, model.ffn_size
    qkv = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    widenings = 2 if model.activation == "swiglu" else 1
    return (
        Product(rows, hidden, qkv / split),
        Product(rows, model.num_attention_heads * model.head_dim / split, hidden),
        Product(rows, hidden, widenings * ffn / split),
        Product(rows, ffn / split, hidden),
    )


def head_product(model: ModelConfig, layout: Layout) -> Product:
    """Forward of the output head."""
    return Product(tokens(layout), model.hidden_size, model.padded_vocab_size / layout.tensor)


def attention_flops(model: ModelConfig, layout: Layout) -> float:
    """Forward operations of one block's scores and values: the causal half with flash attention, else all."""
    keys = (layout.seq_len + 1) / 2 if layout.flash_attention else layout.seq_len
    return 4 * tokens(layout) * keys * model.num_attention_heads * model.head_dim / layout.tensor


def score_elements(model: ModelConfig, layout: Layout) -> float:
    """Attention scores of one block; none are in memory with flash attention."""
    if layout.flash_attention:
        return 0.0
    return tokens(layout) * layout.seq_len * model.num_attention_heads / layout.tensor


def block_elements(model: ModelConfig, layout: Layout) -> float:
    """Elements that one block's element-wise work reads and writes in forward, each pass fused as far as it goes.

    Two norms (read, write), two residual sums (read twice, write), the activation (read, write), the rotation of
    queries and keys (read, write).
    """
    widths = (2 * 2 + 2 * 3) * model.hidden_size
    widths += (3 if model.activation == "swiglu" else 2) * model.ffn_size
    if model.position == "rope":
        widths += 2 * (model.num_attention_heads + model.kv_heads) * model.head_dim
    return tokens(layout) * widths / layout.tensor


def logit_elements(model: ModelConfig, layout: Layout) -> float:
    """Logits of a micro-batch."""
    return tokens(layout) * model.padded_vocab_size / layout.tensor


def gpu_parameters(model: ModelConfig, layout: Layout) -> float:
    """Parameters of one GPU before ZeRO shards them: its part of the fullest stage."""
    embeddings = parameter_count(model) - parameter_count(model, embeddings=False)
    blocks = parameter_count(model, embeddings=False) * stage_layers(model, layout) / model.num_layers
    at_an_end = embeddings if layout.pipeline == 1 else embeddings / (1 if model.tie_embeddings else 2)
    return (blocks + at_an_end) / layout.tensor
