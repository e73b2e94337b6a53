"""nanoGPT's checkpoints against a network written down as its model.py computes it."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megagpt.config import ModelConfig
from megagpt.convert import nanogpt, open_source, tokenizer_of
from megagpt.convert.streamed import gpt_logits
from megagpt.errors import UsageError, UserError
from tests.unit.convert.models import Malicious, converted

ARGUMENTS = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 42,
    "block_size": 37,
    "vocab_size": 101,
    "dropout": 0.0,
}


def checkpoint(bias: bool, **more: object) -> dict[str, object]:
    """What nanoGPT's train.py saves, with random weights."""
    generator, size = torch.Generator().manual_seed(0), ARGUMENTS["n_embd"]

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    model = {"transformer.wte.weight": draw(101, size), "transformer.wpe.weight": draw(37, size)}
    for layer in range(2):
        shapes = {"ln_1": (size,), "attn.c_attn": (3 * size, size), "attn.c_proj": (size, size)}
        shapes |= {"ln_2": (size,), "mlp.c_fc": (4 * size, size), "mlp.c_proj": (size, 4 * size)}
        for name, shape in shapes.items():
            model[f"transformer.h.{layer}.{name}.weight"] = draw(*shape)
            if bias:
                model[f"transformer.h.{layer}.{name}.bias"] = draw(shape[0])
        model[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 37, 37).tril()
    model["transformer.ln_f.weight"] = draw(size)
    if bias:
        model["transformer.ln_f.bias"] = draw(size)
    model["lm_head.weight"] = model["transformer.wte.weight"]
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": draw(101, size)}}, "param_groups": [{"lr": 1e-3}]}
    arguments = ARGUMENTS | {"bias": bias} | more
    return {"model": model, "optimizer": state, "model_args": arguments, "iter_num": 3, "config": {"dataset": "x"}}


def nanogpt_logits(model: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """As model.py: (1, seq) -> (1, seq, vocab)."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (42,), model[f"{name}.weight"], model.get(f"{name}.bias"), 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, model[f"{name}.weight"], model.get(f"{name}.bias"))

    seq = ids.shape[1]
    x = model["transformer.wte.weight"][ids] + model["transformer.wpe.weight"][torch.arange(seq)]
    for layer in range(2):
        h = f"transformer.h.{layer}"
        q, k, v = (
            part.view(1, seq, 3, 14).transpose(1, 2)
            for part in linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).split(42, dim=2)
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(14)).masked_fill(torch.ones(seq, seq).tril() == 0, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, seq, 42)
        x = x + linear(f"{h}.attn.c_proj", attended)
        x = x + linear(f"{h}.mlp.c_proj", F.gelu(linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))))
    return norm("transformer.ln_f", x) @ model["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_nanogpts_and_the_way_back_is_bit_identical(bias, tmp_path):
    content = checkpoint(bias)
    compiled = {f"_orig_mod.{name}": value for name, value in content["model"].items()}
    torch.save(content | {"model": compiled}, tmp_path / "ckpt.pt")
    done = converted(tmp_path / "ckpt.pt", tmp_path / "ours", "megagpt")
    assert done.model.bias is bias
    ids = torch.randint(101, (1, 37), generator=torch.Generator().manual_seed(1))
    source = open_source(tmp_path / "ours")
    expected = nanogpt_logits(content["model"], ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(gpt_logits(source.model, source.weights)(ids), expected, atol=1e-5, rtol=1e-5)
    converted(tmp_path / "ours", tmp_path / "back", "nanogpt")
    back = torch.load(tmp_path / "back/ckpt.pt", weights_only=True)
    assert back["model_args"] == content["model_args"]
    assert back["model"].keys() == {name for name in content["model"] if not name.endswith(".attn.bias")}
    assert all(torch.equal(value, content["model"][name]) for name, value in back["model"].items())


def test_a_tokenizer_may_be_given_and_must_fit(tmp_path):
    torch.save(checkpoint(bias=True), tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match=r"tokenizer bytes has 257 ids, but the model of \S+ knows 101"):
        converted(tmp_path, tmp_path / "ours", "megagpt", tokenizer="bytes")
    content = checkpoint(bias=True, vocab_size=300)
    content["model"]["transformer.wte.weight"] = content["model"]["lm_head.weight"] = torch.randn(300, 42)
    torch.save(content, tmp_path / "ckpt.pt")
    assert converted(tmp_path, tmp_path / "ours", "megagpt", tokenizer="bytes").tokenizer == "bytes"
    assert tokenizer_of(open_source(tmp_path / "ours")).name == "bytes"
    assert converted(tmp_path / "ours", tmp_path / "bare", "hf", tokenizer="none").tokenizer is None
    assert not (tmp_path / "bare/tokenizer.json").exists()


def test_a_model_without_biases_becomes_a_gpt2_with_biases_of_zero(tmp_path):
    torch.save(checkpoint(bias=False), tmp_path / "ckpt.pt")
    done = converted(tmp_path, tmp_path / "hf", "hf")
    assert done.difference.top1 == 1
    weights = load_file(tmp_path / "hf/model.safetensors")
    biases = [value for name, value in weights.items() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(value.any() for value in biases)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"activation": "gelu_tanh"}, "model.activation gelu_tanh .it has gelu"),
        ({"tie_embeddings": False, "norm_eps": 1e-6}, "model.norm_eps 1e-06 .*, model.tie_embeddings False"),
        ({"ffn_hidden_size": 100}, "model.ffn_hidden_size 100 .it has 1152"),
        ({"num_kv_heads": 2}, "model.num_kv_heads 2 .it has 6"),
        ({"position": "rope"}, "model.position rope .it has learned"),
    ],
)
def test_what_nanogpt_cannot_express_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        nanogpt.expressed(ModelConfig(**values), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_args"].update(use_rmsnorm=True), "model_args have use_rmsnorm"),
        (lambda c: c["model_args"].pop("n_head"), "model_args lack n_head"),
        (lambda c: c["model_args"].update(n_layer=3), "has no weight transformer.h.2.ln_1.weight"),
        (lambda c: c["model"].pop("transformer.ln_f.weight"), "has no weight transformer.ln_f.weight"),
        (lambda c: c["model"].update({"lm_head.weight": torch.zeros(101, 42)}), "lm_head.weight differs from"),
        (lambda c: c.pop("model_args"), "has no model_args; it is no checkpoint of nanoGPT"),
        (lambda c: c.pop("model"), "holds other things than tensors"),
    ],
)
def test_a_file_that_is_not_nanogpts_is_named_with_what_is_wrong(change, message, tmp_path):
    content = checkpoint(bias=True)
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message):
        converted(tmp_path, tmp_path / "ours", "megagpt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save(checkpoint(bias=True) | {"config": Malicious(tmp_path / "code was run")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt.pt: is not loaded, since it would call \S*mkdir"):
        converted(tmp_path, tmp_path / "ours", "megagpt")
    assert not (tmp_path / "code was run").exists()
