"""Logits against transformers' models on copied weights: full forward and token by token with a KV cache."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megagpt.config import ModelConfig
from megagpt.inference.cache import KVCache
from megagpt.model import GPT
from tests.unit.model.configs import GPT2, LLAMA, build, tokens


def hf_gpt2(model: GPT) -> GPT2LMHeadModel:
    config = model.config
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            n_inner=config.ffn_size,
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
            layer_norm_epsilon=config.norm_eps,
        )
    )
    weights = model.state_dict()
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feedforward_norm": "ln_2",
        "feedforward.up": "mlp.c_fc",
        "feedforward.down": "mlp.c_proj",
    }
    copied = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.wpe.weight": weights["position_embedding.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "transformer.ln_f.bias": weights["norm.bias"],
        "lm_head.weight": weights["embedding.weight"],
    }
    for layer in range(config.num_layers):
        for ours, theirs in names.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            # GPT-2's Conv1D stores matrices as (in, out).
            copied[f"transformer.h.{layer}.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight
            copied[f"transformer.h.{layer}.{theirs}.bias"] = weights[f"blocks.{layer}.{ours}.bias"]
    hf.load_state_dict(copied)
    return hf.eval()


def hf_llama(model: GPT) -> LlamaForCausalLM:
    config = model.config
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.ffn_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=config.bias,
            mlp_bias=config.bias,
        )
    )
    weights = model.state_dict()
    names = {
        "attention_norm": "input_layernorm",
        "attention.out": "self_attn.o_proj",
        "feedforward_norm": "post_attention_layernorm",
        "feedforward.gate": "mlp.gate_proj",
        "feedforward.up": "mlp.up_proj",
        "feedforward.down": "mlp.down_proj",
    }
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    copied = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": head,
    }
    heads = (config.num_attention_heads, config.kv_heads, config.kv_heads)
    for name, tensor in weights.items():
        if not name.startswith("blocks."):
            continue
        _, layer, rest = name.split(".", 2)
        module, _, leaf = rest.rpartition(".")
        if module == "attention.qkv":
            parts = tensor.split([number * config.head_dim for number in heads])
            for part, theirs in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
                copied[f"model.layers.{layer}.self_attn.{theirs}.{leaf}"] = part
        else:
            copied[f"model.layers.{layer}.{names[module]}.{leaf}"] = tensor
    hf.load_state_dict(copied)
    return hf.eval()


CASES = {
    "gpt2": (GPT2, hf_gpt2),
    "gpt2 with exact gelu": (GPT2.model_copy(update={"activation": "gelu"}), hf_gpt2),
    "llama": (LLAMA, hf_llama),
    "llama, tied, biases, all heads, theta 500000": (
        LLAMA.model_copy(update={"tie_embeddings": True, "bias": True, "num_kv_heads": None, "rope_theta": 500000.0}),
        hf_llama,
    ),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[GPT, PreTrainedModel]:
    config, convert = CASES[request.param]
    model = build(config)
    return model, convert(model)


@torch.no_grad()
def test_full_forward_gives_the_logits_of_transformers(pair):
    model, hf = pair
    ids = tokens(model.config)
    expected = hf(ids).logits
    assert expected.abs().max() > 1, "weights so small that nothing would be compared"
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 40, [17] + [1] * 23, [5, 9, 1, 25]], ids=["single", "prompt", "pieces"])
def test_cached_decoding_gives_the_logits_of_transformers(pair, lengths):
    model, hf = pair
    ids = tokens(model.config)
    cache = KVCache.empty(model.config, batch=2, max_len=40, device=torch.device("cpu"), dtype=torch.float32)
    positions = torch.arange(40).expand(2, -1).split(lengths, dim=1)
    pieces = [
        model(piece, cache=cache.at(where, cache.columns(40)))
        for piece, where in zip(ids.split(lengths, dim=1), positions, strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), hf(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_last_position_only_is_the_last_row_of_all_logits(pair):
    model, _ = pair
    ids = tokens(model.config)
    torch.testing.assert_close(model(ids, last_position_only=True), model(ids)[:, -1:], atol=1e-5, rtol=0)


def test_gradients_are_those_of_transformers(pair):
    """The fused loss, down to the embeddings: a backward pass through everything."""
    model, hf = pair
    ids = tokens(model.config)
    model.zero_grad()
    hf.zero_grad()
    (model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
    hf(ids, labels=ids).loss.backward()
    name = "transformer.wte.weight" if "transformer.wte.weight" in hf.state_dict() else "model.embed_tokens.weight"
    torch.testing.assert_close(model.embedding.weight.grad, hf.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_sinusoidal_positions_are_those_of_the_paper():
    """Vaswani et al. 2017, section 3.5, one by one; and embeddings are multiplied by sqrt(d), section 3.4."""
    config = ModelConfig(
        vocab_size=11, num_layers=1, hidden_size=6, num_attention_heads=1, max_seq_len=9, position="sinusoidal"
    )
    model = build(config).double()
    ids = tokens(config, batch=1, seq=9)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    for position in range(9):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6), dtype=torch.float64)
            embedded = model.embedding.weight[ids[0, position]] * 6**0.5
            expected = torch.stack((embedded[2 * i] + angle.sin(), embedded[2 * i + 1] + angle.cos()))
            torch.testing.assert_close(seen[0][0, position, 2 * i : 2 * i + 2], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_positions_beyond_the_learned_ones_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="41 tokens, but only 40 learned positions"):
        build(GPT2)(tokens(GPT2, seq=41))
