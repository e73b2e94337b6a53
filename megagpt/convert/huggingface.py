"""Hugging Face's folders: GPT2LMHeadModel and LlamaForCausalLM, in both directions, without transformers.

    config.json                         the architecture; whatever of it our model cannot express is refused by name
    model.safetensors                   or several files with an index, or pytorch_model.bin as older versions wrote it
    tokenizer.json, generation_config.json, ...

GPT-2 stores its matrices as (in, out), and always has biases; Llama has queries, keys and values apart. The rotary
layout is ours, so that nothing else is turned.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagpt.config.schema import ModelConfig
from megagpt.convert.names import (
    GPT2_EMBEDDINGS,
    Entry,
    check_expressible,
    from_foreign,
    gpt2_modules,
    is_gpt2_mask,
    tied,
    to_foreign,
)
from megagpt.convert.torch_weights import read_torch_weights
from megagpt.convert.writing import INDEX
from megagpt.errors import UsageError, UserError
from megagpt.training.export import model_of, read_safetensors
from megagpt.training.weights import Weight, Weights

CONFIG = "config.json"
_BIN = "pytorch_model.bin"
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Weight]]:
    """The model of a Hugging Face folder, and its weights by our names.

    Raises UsageError for an architecture that our model cannot express, UserError for what is missing or damaged.
    """
    config = read_config(folder)
    stored, where = stored_weights(folder), str(folder)
    plain: Weights
    if config["model_type"] == "gpt2":
        model = _gpt2_model(config, where)
        plain = {name.removeprefix("transformer."): weight for name, weight in stored.items()}
        entries = [
            entry._replace(theirs=tuple(name.removeprefix("transformer.") for name in entry.theirs))
            for entry in _gpt2_entries(model)
        ]
        ignored = is_gpt2_mask
    else:
        model = _llama_model(config, where)
        plain, entries, ignored = stored, _llama_entries(model), lambda name: name.endswith(".inv_freq")
    if model.tie_embeddings:
        plain = tied(plain, entries[0].theirs[0], where)
    return model, from_foreign(entries, plain, ignored, where)


def expressed(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The same model as one of Hugging Face's can hold it: GPT-2 without biases gets biases of zero.

    Raises UsageError with all that neither of its families can express.
    """
    if model.position == "rope":
        needed: dict[str, tuple[object, ...]] = {"norm": ("rmsnorm",), "activation": ("swiglu",)}
        check_expressible(model, needed, "--to hf: Hugging Face's Llama")
        return model, weights
    needed = {
        "position": ("learned",),
        "norm": ("layernorm",),
        "activation": ("gelu_tanh", "gelu"),
        "kv_heads": (model.num_attention_heads,),
    }
    check_expressible(model, needed, "--to hf: Hugging Face's GPT-2")
    return with_biases(model, weights)


def with_biases(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The same function with biases everywhere, those that are missing zero."""
    if model.bias:
        return model, weights
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        found[name] = weight
        if name.startswith(("blocks.", "norm.")):
            found[name.removesuffix("weight") + "bias"] = _zeros(weight.shape[0], weight.dtype)
    return model.model_copy(update={"bias": True}), found


def foreign_weights(model: ModelConfig, weights: Weights) -> dict[str, Weight]:
    """Our weights (of a model that was `expressed`) by Hugging Face's names."""
    entries = _llama_entries(model) if model.position == "rope" else _gpt2_entries(model)
    return to_foreign(entries, model, weights)


def config_of(model: ModelConfig, dtype: torch.dtype, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that was `expressed`; readable by transformers 4 and 5.

    special_ids: bos_token_id and eos_token_id, null where there is none, as the defaults fit other vocabularies.
    """
    common = {
        "vocab_size": model.vocab_size,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **special_ids,
    }
    if model.position == "rope":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "max_position_embeddings": model.max_seq_len,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,  # of transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},  # of transformers 5
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "attention_dropout": model.dropout,
            **common,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_seq_len,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "attn_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        **common,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises UserError if it is none, UsageError if it is of an unknown kind of model."""
    config = read_json(folder / CONFIG)
    kind = config.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise UsageError(f"{folder / CONFIG}: model_type {kind!r} is none that is read here; gpt2 and llama are")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no JSON object")
    return values


def stored_weights(folder: Path) -> dict[str, Weight]:
    """The tensors of a Hugging Face folder by its own names: of safetensors if there are any, else of .bin files."""
    for name, index, read in (
        ("model.safetensors", INDEX, partial(read_safetensors, skips_integers=True)),
        (_BIN, f"{_BIN}.index.json", read_torch_weights),
    ):
        if (folder / index).is_file():
            return _indexed(folder, folder / index, read)
        if (folder / name).is_file():
            return read([folder / name])
    raise UserError(f"{folder}: has no weights (model.safetensors, {_BIN}, or their index)")


def _indexed(folder: Path, index: Path, read: Callable[[list[Path]], dict[str, Weight]]) -> dict[str, Weight]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of names; copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {name}, which is not beside it; copy all files")
    weights = read([folder / name for name in names])
    if lacking := sorted(weight_map.keys() - weights.keys()):
        raise UserError(f"{folder / weight_map[lacking[0]]}: has no weight {lacking[0]}, though {index.name} says so")
    return weights


def _gpt2_entries(model: ModelConfig) -> list[Entry]:
    entries = list(GPT2_EMBEDDINGS)
    for ours, theirs in gpt2_modules(model):
        entries.append(Entry(f"{ours}.weight", (f"{theirs}.weight",), transposed="norm" not in ours))
        entries.append(Entry(f"{ours}.bias", (f"{theirs}.bias",)))
    return entries if model.tie_embeddings else [*entries, Entry("head.weight", ("lm_head.weight",))]


def _llama_entries(model: ModelConfig) -> list[Entry]:
    entries = [Entry("embedding.weight", ("model.embed_tokens.weight",))]
    names = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "feedforward.up": ("mlp.up_proj",),
        "feedforward.gate": ("mlp.gate_proj",),
        "feedforward.down": ("mlp.down_proj",),
    }
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        entries.append(Entry(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)))
        entries.append(Entry(f"{ours}.feedforward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)))
        entries += [
            Entry(f"{ours}.{name}.{leaf}", tuple(f"{theirs}.{part}.{leaf}" for part in parts))
            for name, parts in names.items()
            for leaf in (("weight", "bias") if model.bias else ("weight",))
        ]
    entries.append(Entry("norm.weight", ("model.norm.weight",)))
    return entries if model.tie_embeddings else [*entries, Entry("head.weight", ("lm_head.weight",))]


def _gpt2_model(config: Mapping[str, Any], where: str) -> ModelConfig:
    _refuse_unless(config, {"scale_attn_weights": (True, True), "scale_attn_by_inverse_layer_idx": (False, False),
                            "add_cross_attention": (False, False)}, where)  # fmt: skip
    _check_sizes(config, ("n_embd", "n_layer", "n_head", "n_positions"), where)
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UsageError(f"{where}: activation_function {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    values = {
        "hidden_size": config["n_embd"],
        "num_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "ffn_hidden_size": config.get("n_inner"),
        "max_seq_len": config["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": _ACTIVATIONS[activation],
        "bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "dropout": config.get("resid_pdrop", 0.1),
    }
    return _model(config, values, where)


def _llama_model(config: Mapping[str, Any], where: str) -> ModelConfig:
    _check_sizes(config, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), where)
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden_size // heads
    _refuse_unless(config, {"hidden_act": ("silu", "silu"), "head_dim": (head_dim, head_dim)}, where)
    if config.get("attention_bias", False) != config.get("mlp_bias", False):
        raise UsageError(
            f"{where}: attention_bias and mlp_bias differ, but this model has biases in both kinds of layers or in none"
        )
    values = {
        "hidden_size": hidden_size,
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads"),
        "ffn_hidden_size": config["intermediate_size"],
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "position": "rope",
        "rope_theta": _rope_theta(config, where),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "bias": config.get("attention_bias", False),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "dropout": config.get("attention_dropout", 0.0),
    }
    return _model(config, values, where)


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies. Raises UsageError for scaled ones, in the words of transformers 4 or 5."""
    options: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        options |= config.get(key) or {}
    kind = options.get("rope_type", options.get("type", "default"))
    if kind != "default":
        raise UsageError(f"{where}: its rotary positions are scaled (rope_type {kind}), which this model does not do")
    factor = options.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if factor != 1.0:
        raise UsageError(f"{where}: partial_rotary_factor {factor}: this model turns whole heads only")
    return float(options.get("rope_theta", config.get("rope_theta", 10000.0)))


def _refuse_unless(config: Mapping[str, Any], needed: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """needed: key to the value that our model has, and the value if the key is not there or null."""
    for key, (value, default) in needed.items():
        found = default if config.get(key) is None else config[key]
        if found != value:
            raise UsageError(f"{where}: its {key} is {found}, but this model knows {value} only")


def _check_sizes(config: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in (*keys, "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UserError(f"{where}: its config.json has {key}={config.get(key)!r}, where a number above 0 must be")


def _model(config: Mapping[str, Any], values: Mapping[str, Any], where: str) -> ModelConfig:
    common = {"vocab_size": config["vocab_size"], "initializer_range": config.get("initializer_range", 0.02)}
    given = common | dict(values)
    return model_of(given | {key: float(given[key]) for key in _FLOATS if isinstance(given.get(key), int)}, where)


_FLOATS = ("norm_eps", "dropout", "initializer_range", "rope_theta")


def _zeros(size: int, dtype: torch.dtype) -> Weight:
    return Weight((size,), dtype, lambda: torch.zeros(size, dtype=dtype))
