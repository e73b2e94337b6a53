"""Initial weights: their distribution, and that nothing but seed and name decides them."""

import contextlib
import math

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.config.compatibility import weight_differences
from megagpt.model import GPT, initialize_weights, learning_rate_scale, parameter_kind

CONFIG = ModelConfig(vocab_size=503, num_layers=8, hidden_size=96, num_attention_heads=6, max_seq_len=64)
LLAMA = CONFIG.model_copy(
    update={"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "tie_embeddings": False}
)


def initialized(config: ModelConfig, seed: int = 0) -> GPT:
    model = GPT(config)
    initialize_weights(model, seed)
    return model


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_each_parameter_has_gpt2s_distribution(config):
    for name, parameter in initialized(config).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            n = parameter.numel()
            # Five standard errors of the estimates of mean and standard deviation.
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * n), name


def test_no_two_matrices_are_equal():
    matrices = [p.flatten()[:64] for p in initialized(CONFIG).parameters() if p.dim() == 2]
    scaled = torch.stack([m / m.std() for m in matrices])
    correlation = torch.corrcoef(scaled) - torch.eye(len(scaled))
    assert correlation.abs().max() < 0.6


def test_a_parameter_depends_on_its_name_and_the_seed_only():
    """A deeper, untied model has the same weights wherever names and scale agree."""
    torch.manual_seed(1)
    first = dict(initialized(CONFIG).named_parameters())
    torch.manual_seed(2)
    other_config = CONFIG.model_copy(update={"num_layers": 9, "tie_embeddings": False})
    second = dict(initialized(other_config).named_parameters())
    for name in ("embedding.weight", "position_embedding.weight", "blocks.7.attention.qkv.weight"):
        assert torch.equal(first[name], second[name]), name
    third = dict(initialized(CONFIG, seed=1).named_parameters())
    assert not torch.equal(first["embedding.weight"], third["embedding.weight"])


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["tied", "untied"])
def test_padding_of_the_vocabulary_is_zero_and_changes_no_other_weight(config):
    plain = dict(initialized(config).named_parameters())
    for name, parameter in initialized(config.model_copy(update={"vocab_multiple_of": 64})).named_parameters():
        rows = len(plain[name])
        assert torch.equal(parameter[:rows], plain[name]), name
        is_padded = name in ("embedding.weight", "head.weight")
        assert len(parameter) == (512 if is_padded else rows), name
        assert not parameter[rows:].any(), name


def test_low_precision_models_start_from_the_rounded_fp32_weights():
    rounded = GPT(CONFIG).bfloat16()
    initialize_weights(rounded, 0)
    for (name, exact), parameter in zip(initialized(CONFIG).named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), parameter), name


def test_sharded_parameters_are_written_whole_inside_gather():
    """A stand-in for ZeRO-3: outside the context a parameter is empty."""
    model, whole = GPT(CONFIG), initialized(CONFIG)
    shards = {}
    for parameter in model.parameters():
        shards[parameter] = parameter.data
        parameter.data = torch.empty(0)

    @contextlib.contextmanager
    def gather(parameters):
        for parameter in parameters:
            parameter.data = shards[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    initialize_weights(model, 0, gather)
    for (name, expected), parameter in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert parameter.numel() == 0
        assert torch.equal(shards[parameter], expected), name


def test_tied_weights_are_one_parameter():
    names = [name for name, _ in initialized(CONFIG).named_parameters(remove_duplicate=False)]
    assert "head.weight" not in names
    assert "head.weight" in dict(initialized(LLAMA).named_parameters())


def test_kinds_of_all_parameters():
    kinds = {name: parameter_kind(name) for config in (CONFIG, LLAMA) for name, _ in GPT(config).named_parameters()}
    modules = {name: module for config in (CONFIG, LLAMA) for name, module in GPT(config).named_modules()}
    expected = {"LayerNorm": "norm", "RMSNorm": "norm", "Embedding": "embedding", "Linear": "matrix"}
    for name, kind in kinds.items():
        module, _, leaf = name.rpartition(".")
        wanted = "head" if module == "head" else expected[type(modules[module]).__name__]
        assert kind == ("bias" if leaf == "bias" and wanted == "matrix" else wanted), name


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_mup_narrows_the_matrices_of_the_blocks_and_the_last_gain_only(config):
    """Yang et al. 2022, table 8: hidden matrices 1/sqrt(r) of the base's; the multiplier 1/r is in the last gain."""
    base = dict(initialized(config).named_parameters())
    wide = dict(initialized(config.model_copy(update={"mup_base_width": 24})).named_parameters())
    for name, parameter in wide.items():
        factor = 0.5 if parameter_kind(name) == "matrix" else 0.25 if name == "norm.weight" else 1.0
        assert torch.allclose(parameter, base[name] * factor), name
        slowed = parameter_kind(name) == "matrix" or name in ("norm.weight", "norm.bias")
        model = config.model_copy(update={"mup_base_width": 24})
        assert learning_rate_scale(name, model) == (0.25 if slowed else 1.0), name
        assert learning_rate_scale(name, config) == 1.0


def test_mup_is_no_part_of_what_a_model_computes():
    """So that checkpoints, exports and decoding need to know nothing of it."""
    plain = initialized(LLAMA)
    other = GPT(LLAMA.model_copy(update={"mup_base_width": 24}))
    other.load_state_dict(plain.state_dict())
    tokens = torch.randint(503, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(tokens), plain(tokens))
    assert not weight_differences(LLAMA, other.config)
