"""Tiny models of odd shapes, one a family, and tokens for them."""

import torch

from megagpt.config import ModelConfig
from megagpt.model import GPT, initialize_weights

GPT2 = ModelConfig(
    vocab_size=101, num_layers=3, hidden_size=48, num_attention_heads=6, max_seq_len=40, activation="gelu_tanh"
)
LLAMA = ModelConfig(
    vocab_size=97,
    num_layers=3,
    hidden_size=60,
    num_attention_heads=6,
    num_kv_heads=2,
    ffn_hidden_size=83,
    max_seq_len=40,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
SINUSOIDAL = GPT2.model_copy(update={"position": "sinusoidal", "activation": "gelu", "bias": False})
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "sinusoidal": SINUSOIDAL}


def build(config: ModelConfig, seed: int = 0, **options: int) -> GPT:
    """A model in which everything matters: weights and biases random, norms not 1."""
    model = GPT(config, **options)
    initialize_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(config: ModelConfig, batch: int = 2, seq: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, seq)."""
    return torch.randint(0, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
