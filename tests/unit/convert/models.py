"""Models of transformers with random weights of odd shapes, saved by transformers itself, and conversions of them."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megagpt.convert import Conversion, Options, convert

GPT2 = {
    "vocab_size": 101,
    "n_positions": 37,
    "n_embd": 42,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 59,
    "bos_token_id": None,
    "eos_token_id": None,
    "layer_norm_epsilon": 1e-4,
}
LLAMA = {
    "vocab_size": 97,
    "max_position_embeddings": 41,
    "hidden_size": 60,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, Any] = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2, exact gelu, untied": GPT2Config(**GPT2, activation_function="gelu", tie_word_embeddings=False),
    "llama": LlamaConfig(**LLAMA),
    "llama, tied, biases, one kv head, theta": LlamaConfig(
        **LLAMA | {"num_key_value_heads": 1},
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
}


def build(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model in which everything matters: all weights random, norms and biases too."""
    model = (GPT2LMHeadModel if config.model_type == "gpt2" else LlamaForCausalLM)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ids_for(config: Any, seq: int = 33) -> torch.Tensor:
    """Random token ids (2, seq)."""
    return torch.randint(config.vocab_size, (2, seq), generator=torch.Generator().manual_seed(1))


def converted(source: Path, target: Path, kind: str, **options: Any) -> Conversion:
    """`convert` without progress."""
    return convert(source, target, kind, Options(**options), lambda what, total: nullcontext(lambda done: None))


class Malicious:
    """Pickled, it makes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)
