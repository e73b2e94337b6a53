"""Parameters and floating-point operations of a GPT as exact functions of its configuration.

A multiply-add counts as two operations. Counted are the matrix products: projections, attention scores and values,
output head. Not counted are norms, activations, softmax and table look-ups, whose time is memory traffic. Backward
costs twice forward: one product for the gradient of the input, one for that of the weights.
"""

from megagpt.config.schema import ModelConfig


def parameter_count(config: ModelConfig, embeddings: bool = True) -> int:
    """Number of trainable parameters; tied weights count once, and what pads the vocabulary counts.

    embeddings=False leaves out the token and position tables and an untied output head: the N of Kaplan et al. 2020.
    """
    hidden, vocab = config.hidden_size, config.padded_vocab_size
    matrices, biases = _layer_matrices(config)
    has_norm_bias = config.norm == "layernorm" and config.bias
    norm = hidden * (2 if has_norm_bias else 1)
    layer = matrices + (biases if config.bias else 0) + 2 * norm
    total = config.num_layers * layer + norm
    if embeddings:
        total += vocab * hidden * (1 if config.tie_embeddings else 2)
        total += config.max_seq_len * hidden if config.position == "learned" else 0
    return total


def flops_per_token(config: ModelConfig, seq_len: int, *, backward: bool = True, causal: bool = False) -> int:
    """Floating-point operations a token, in sequences of `seq_len` tokens: forward + backward, or forward only.

    Forward: 2 x (layers x matrices + vocabulary x hidden) + layers x 4 x keys x hidden, where keys is the number of
    positions a query meets. By the usual convention (Chowdhery et al. 2022, app. B) that is seq_len, as if no score
    were masked; `causal` counts only the needed ones, (seq_len + 1) / 2 on average. Not counted are
    recomputation and what pads the vocabulary.
    """
    matrices, _ = _layer_matrices(config)
    products = 2 * (config.num_layers * matrices + config.vocab_size * config.hidden_size)
    attention = config.num_layers * 2 * config.hidden_size * (seq_len + 1 if causal else 2 * seq_len)
    return (products + attention) * (3 if backward else 1)


def _layer_matrices(config: ModelConfig) -> tuple[int, int]:
    """Elements of one layer's matrices, and of their biases."""
    hidden, ffn = config.hidden_size, config.ffn_size
    qkv = (config.num_attention_heads + 2 * config.kv_heads) * config.head_dim
    widenings = 2 if config.activation == "swiglu" else 1
    matrices = hidden * qkv + hidden * hidden + (widenings + 1) * hidden * ffn
    return matrices, qkv + hidden + widenings * ffn + hidden
