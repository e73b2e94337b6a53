"""Megatron-LM's layouts, made of transformers' models by the rules of its own tools, against these models' logits."""

import argparse
import enum
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megagpt.convert import open_source
from megagpt.convert.streamed import gpt_logits
from megagpt.errors import UsageError, UserError
from tests.unit.convert.models import CASES, Malicious, build, converted, ids_for

ARGUMENTS = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "num_experts": None}


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Group after group: its query heads, its key, its value."""
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat([torch.cat([part[group] for part in parts]) for group in range(groups)])


def core_from_llama(model: PreTrainedModel, fused_norms: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """megatron.core's names, with Transformer Engine's fused norms or without."""
    config, w = model.config, model.state_dict()
    found = {"embedding.word_embeddings.weight": w["model.embed_tokens.weight"]}
    for layer in range(config.num_hidden_layers):
        theirs, name = f"model.layers.{layer}", f"decoder.layers.{layer}"
        qkv = [w[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv"]
        found[f"{name}.self_attention.linear_qkv.weight"] = grouped(*qkv, config.num_key_value_heads)
        found[f"{name}.self_attention.linear_qkv._extra_state"] = None
        found[f"{name}.self_attention.linear_proj.weight"] = w[f"{theirs}.self_attn.o_proj.weight"]
        halves = [w[f"{theirs}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        found[f"{name}.mlp.linear_fc1.weight"] = torch.cat(halves)
        found[f"{name}.mlp.linear_fc2.weight"] = w[f"{theirs}.mlp.down_proj.weight"]
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if not fused_norms:
            norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        found[f"{name}.{norms[0]}"] = w[f"{theirs}.input_layernorm.weight"]
        found[f"{name}.{norms[1]}"] = w[f"{theirs}.post_attention_layernorm.weight"]
    found["decoder.final_layernorm.weight"] = w["model.norm.weight"]
    found["output_layer.weight"] = w["lm_head.weight"]
    arguments = {
        "padded_vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "ffn_hidden_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    return found, arguments


def legacy_from_gpt2(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names before megatron.core, nested."""
    config, w = model.config, model.state_dict()
    layers: dict[str, Any] = {}
    for layer in range(config.n_layer):
        theirs, name = f"transformer.h.{layer}", f"layers.{layer}"
        for ours, part in {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}.items():
            layers |= {f"{name}.{ours}.{leaf}": w[f"{theirs}.{part}.{leaf}"] for leaf in ("weight", "bias")}
        matrices = {
            "self_attention.dense": "attn.c_proj",
            "mlp.dense_h_to_4h": "mlp.c_fc",
            "mlp.dense_4h_to_h": "mlp.c_proj",
        }
        for ours, part in matrices.items():
            layers |= {f"{name}.{ours}.weight": w[f"{theirs}.{part}.weight"].T.contiguous()}
            layers |= {f"{name}.{ours}.bias": w[f"{theirs}.{part}.bias"]}
        for leaf in ("weight", "bias"):
            value = w[f"{theirs}.attn.c_attn.{leaf}"]
            parts = (value.T if leaf == "weight" else value).chunk(3)
            layers[f"{name}.self_attention.query_key_value.{leaf}"] = grouped(*parts, config.n_head)
    layers |= {f"final_layernorm.{leaf}": w[f"transformer.ln_f.{leaf}"] for leaf in ("weight", "bias")}
    embedding = {
        "word_embeddings": {"weight": w["transformer.wte.weight"]},
        "position_embeddings": {"weight": w["transformer.wpe.weight"]},
    }
    arguments = {
        "padded_vocab_size": config.vocab_size,
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "ffn_hidden_size": config.n_inner,
        "max_position_embeddings": config.n_positions,
        "layernorm_epsilon": config.layer_norm_epsilon,
        "bias_gelu_fusion": True,
    }
    return {"language_model": {"embedding": embedding, "encoder": layers}}, arguments


def write(folder: Path, model: dict[str, Any], arguments: dict[str, Any], **more: Any) -> Path:
    """As Megatron-LM saves: settings as a namespace with an enumeration of its own, random states of numpy."""
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", ["encoder_or_decoder"], module=module.__name__)
    module.ModelType = kind
    sys.modules |= {"megatron": types.ModuleType("megatron"), "megatron.core": types.ModuleType("megatron.core")}
    sys.modules[module.__name__] = module
    try:
        args = argparse.Namespace(
            **ARGUMENTS | arguments, model_type=kind.encoder_or_decoder, params_dtype=torch.float32
        )
        states = [{"np_rng_state": ("MT19937", np.arange(3, dtype=np.uint32), 1, 0, 0.0)}]
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 20, "model": model, "rng_state": states}
        file = folder / "iter_0000020/mp_rank_00/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save(content | more, file)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
            del sys.modules[name]
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    return file


@torch.no_grad()
@pytest.mark.parametrize("form", ["core with fused norms", "core", "legacy"])
def test_logits_are_those_of_the_model_it_was_made_of(form, tmp_path):
    theirs = build(CASES["gpt2" if form == "legacy" else "llama"])
    if form == "legacy":
        write(tmp_path / "megatron", *legacy_from_gpt2(theirs))
    else:
        write(tmp_path / "megatron", *core_from_llama(theirs, "fused" in form))
    ids = ids_for(theirs.config)
    expected = theirs(ids).logits
    for path in (tmp_path / "megatron", tmp_path / "megatron/iter_0000020"):
        source = open_source(path)
        torch.testing.assert_close(gpt_logits(source.model, source.weights)(ids), expected, atol=1e-5, rtol=1e-5)
    assert converted(tmp_path / "megatron", tmp_path / "hf", "hf").difference.top1 == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 8}, "its num_experts is 8, but this model knows False only"),
        ({"rotary_percent": 0.5}, "its rotary_percent is 0.5"),
        ({"use_rope_scaling": True}, "its use_rope_scaling is True"),
        ({"qk_layernorm": True}, "its qk_layernorm is True"),
        ({"kv_channels": 20}, "its kv_channels is 20, but this model knows 10 only"),
        ({"add_qkv_bias": True}, "its add_qkv_bias is True"),
        ({"normalization": "LayerNorm"}, "LayerNorm with biases and linear layers without"),
        ({"tensor_model_parallel_size": 2}, "its tensor_model_parallel_size is 2"),
    ],
)
def test_what_our_model_cannot_express_is_refused(arguments, message, tmp_path):
    model, own = core_from_llama(build(CASES["llama"]), True)
    write(tmp_path / "megatron", model, own | arguments)
    with pytest.raises(UsageError, match=message):
        open_source(tmp_path / "megatron")


def test_old_orders_cut_checkpoints_and_code_are_refused(tmp_path):
    model, arguments = core_from_llama(build(CASES["llama"]), True)
    write(tmp_path / "old", model, arguments, checkpoint_version=1.0)
    with pytest.raises(UsageError, match=r"checkpoint_version 1.0 orders queries"):
        open_source(tmp_path / "old")
    file = write(tmp_path / "cut", model, arguments)
    (file.parent.parent / "mp_rank_01").mkdir()
    (file.parent.parent / "mp_rank_01" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="is cut among 2 tensor- or pipeline-parallel ranks"):
        open_source(tmp_path / "cut")
    write(tmp_path / "code", model, arguments, opt_param_scheduler=Malicious(tmp_path / "code was run"))
    with pytest.raises(UserError, match="is not loaded, since it would call"):
        open_source(tmp_path / "code")
    assert not (tmp_path / "code was run").exists()
