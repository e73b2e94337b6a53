"""Parameters and FLOPs against published numbers and brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import ModelConfig
from megagpt.model import GPT, flops_per_token, parameter_count
from tests.unit.model.configs import FAMILIES, build, tokens

GPT2_124M = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, max_seq_len=1024)
LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    max_seq_len=8192,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)


def counted(config: ModelConfig, without: tuple[str, ...] = ()) -> int:
    with torch.device("meta"):
        model = GPT(config)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without or ("-",)))


@pytest.mark.parametrize(
    ("config", "published"), [(GPT2_124M, 124_439_808), (LLAMA_3_8B, 8_030_261_248)], ids=["GPT-2", "Llama 3 8B"]
)
def test_published_parameter_counts(config, published):
    assert parameter_count(config) == published == counted(config)


CONFIGS = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 300),
    vocab_multiple_of=st.sampled_from([1, 64]),
    num_layers=st.integers(1, 3),
    hidden_size=st.sampled_from([24, 48]),
    num_attention_heads=st.sampled_from([4, 6]),
    num_kv_heads=st.sampled_from([None, 1, 2]),
    ffn_hidden_size=st.none() | st.integers(1, 99),
    max_seq_len=st.integers(1, 64),
    position=st.sampled_from(["learned", "sinusoidal", "rope"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    bias=st.booleans(),
    tie_embeddings=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_parameter_count_is_that_of_the_built_model(config):
    assert parameter_count(config) == counted(config)
    assert parameter_count(config, embeddings=False) == counted(config, ("embedding", "position_embedding", "head"))


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_torch_counts(family):
    model = build(FAMILIES[family])
    ids = tokens(model.config, batch=2, seq=24)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(ids, ids)
        with FlopCounterMode(display=False) as both:
            model(ids, ids).backward()
    assert flops_per_token(model.config, 24, backward=False) * ids.numel() == forward.get_total_flops()
    assert flops_per_token(model.config, 24) * ids.numel() == both.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_the_vocabulary_is_no_work_that_was_asked_for(family):
    padded = FAMILIES[family].model_copy(update={"vocab_multiple_of": 512})
    assert flops_per_token(padded, 24) == flops_per_token(FAMILIES[family], 24)


def test_causal_flops_count_each_query_with_the_keys_up_to_its_own():
    config, seq = FAMILIES["llama"], 7
    pairs = sum(query + 1 for query in range(seq))
    full, causal = (flops_per_token(config, seq, backward=False, causal=flag) * seq for flag in (False, True))
    per_pair = 2 * 2 * config.hidden_size * config.num_layers
    assert full - causal == (seq * seq - pairs) * per_pair
