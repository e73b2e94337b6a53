"""Megatron-LM's checkpoints in torch's format (--ckpt-format torch), read only, of one tensor- and pipeline-rank.

    iter_0001000/mp_rank_00/model_optim_rng.pt     {"args": ..., "model": ..., "checkpoint_version": ...}

Two generations of names are known: megatron.core's (with or without Transformer Engine) and the older
language_model's; see tools/checkpoint/schema_mcore.py in Megatron-LM, and convert_megatron_gpt2_checkpoint.py in
transformers. In both, queries, keys and values lie together by groups: (groups, [its query heads | key | value]), and
SwiGLU's gate lies before the other half. The vocabulary is as padded as it was in training: the file does not say how
large it is without.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagpt.config.schema import ModelConfig
from megagpt.convert.names import Entry, from_foreign
from megagpt.convert.torch_weights import read_torch_weights
from megagpt.errors import UsageError, UserError
from megagpt.model.gpt import GPT
from megagpt.training.export import model_of
from megagpt.training.torch_files import Inert, foreign_names, read_torch_file
from megagpt.training.weights import Weight

_FILE = "model_optim_rng.pt"
_ITERATION = "latest_checkpointed_iteration.txt"

# Classes in which a file keeps settings and random states: none of them is loaded, stand-ins hold their attributes.
_KNOWN = ("megatron.", "argparse.Namespace", "types.SimpleNamespace", "numpy.", "enum.", "pathlib.")

_CORE = {
    "attention_norm": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "attention.qkv": ("self_attention.linear_qkv.",),
    "attention.out": ("self_attention.linear_proj.",),
    "feedforward_norm": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    "feedforward.up": ("mlp.linear_fc1.",),
    "feedforward.down": ("mlp.linear_fc2.",),
}
_LEGACY = {
    "attention_norm": ("input_layernorm.",),
    "attention.qkv": ("self_attention.query_key_value.", "attention.query_key_value."),
    "attention.out": ("self_attention.dense.", "attention.dense."),
    "feedforward_norm": ("post_attention_layernorm.", "post_attention_norm."),
    "feedforward.up": ("mlp.dense_h_to_4h.",),
    "feedforward.down": ("mlp.dense_4h_to_h.",),
}


def find_file(path: Path) -> Path | None:
    """The file of weights of a Megatron-LM checkpoint: `path` itself, or within a folder of one; None if it is none."""
    if path.name == _FILE:
        return path
    if (path / _ITERATION).is_file():
        iteration = (path / _ITERATION).read_text(encoding="utf-8").strip()
        path = path / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
    ranks = sorted(path.glob(f"mp_rank_*/{_FILE}"))
    if len(ranks) > 1:
        raise UsageError(
            f"{path}: is cut among {len(ranks)} tensor- or pipeline-parallel ranks; join them first with Megatron-LM's "
            "tools/checkpoint/convert.py --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1"
        )
    return ranks[0] if ranks else None


def read_file(path: Path) -> tuple[ModelConfig, dict[str, Weight]]:
    """The model of Megatron-LM's file at `path`, and its weights by our names. Raises UserError or UsageError."""
    classes = {name: Inert for name in foreign_names(path) if name.startswith(_KNOWN)}
    content = read_torch_file(path, classes)
    if not isinstance(content, Mapping) or "model" not in content or "args" not in content:
        raise UserError(f"{path}: has no args and model; it is no checkpoint of Megatron-LM that can be read here")
    arguments, version = vars(content["args"]), content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise UsageError(
            f"{path}: checkpoint_version {version} orders queries, keys and values in another way; 2 is read"
        )
    model = _model(arguments, str(path))
    del content
    stored = read_torch_weights([path], lambda content: _flat(content["model"]), classes)
    plain = _plain_names(stored, model, str(path))
    return model, from_foreign(_entries(model), plain, lambda name: name.endswith("_extra_state"), str(path))


def _model(arguments: Mapping[str, Any], where: str) -> ModelConfig:
    def get(key: str, default: Any = None) -> Any:
        return default if arguments.get(key) is None else arguments[key]

    bias, swiglu, norm = get("add_bias_linear", True), get("swiglu", False), get("normalization", "LayerNorm")
    has_rope = get("position_embedding_type", "learned_absolute") == "rope"
    heads, hidden_size = get("num_attention_heads"), get("hidden_size")
    head_dim = hidden_size // heads if isinstance(heads, int) and isinstance(hidden_size, int) and heads else None
    needed = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "kv_channels": head_dim,
        "rotary_percent": 1.0,
        "position_embedding_type": "rope" if has_rope else "learned_absolute",
        "normalization": norm if norm in ("LayerNorm", "RMSNorm") else "LayerNorm or RMSNorm",
        "add_qkv_bias": bias,
    }
    needed |= dict.fromkeys(
        (
            "rotary_interleaved", "use_rope_scaling", "apply_layernorm_1p", "squared_relu", "qk_layernorm",
            "apply_residual_connection_post_layernorm", "multi_latent_attention", "quick_geglu", "num_experts",
        ),
        False,
    )  # fmt: skip
    for key, value in needed.items():
        if (found := get(key, value)) != value and not (key == "add_qkv_bias" and not found):
            raise UsageError(f"{where}: its {key} is {found}, but this model knows {value} only")
    if norm == "LayerNorm" and not bias:
        raise UsageError(f"{where}: LayerNorm with biases and linear layers without cannot be expressed by this model")
    groups = get("num_query_groups") if get("group_query_attention", False) else None
    has_tanh = get("openai_gelu", False) or get("bias_gelu_fusion", True)
    values = {
        "vocab_size": get("padded_vocab_size"),
        "num_layers": get("num_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_kv_heads": groups,
        "ffn_hidden_size": get("ffn_hidden_size"),
        "max_seq_len": get("max_position_embeddings"),
        "position": "rope" if has_rope else "learned",
        "rope_theta": float(get("rotary_base", 10000)),
        "norm": norm.lower(),
        "norm_eps": float(get("norm_epsilon", get("layernorm_epsilon", 1e-5))),
        "activation": "swiglu" if swiglu else "gelu_tanh" if has_tanh else "gelu",
        "bias": bias,
        "tie_embeddings": not get("untie_embeddings_and_output_weights", False),
        "dropout": float(get("hidden_dropout", 0.0)),
    }
    return model_of(values, where)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested dictionaries as one, with dotted names; what is no tensor is left out."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


def _plain_names(stored: Mapping[str, Weight], model: ModelConfig, where: str) -> dict[str, Weight]:
    """Either generation's weights by our own names, where these have one; others keep theirs."""
    is_core = "embedding.word_embeddings.weight" in stored
    names = _CORE if is_core else _LEGACY
    found = {}
    for name, weight in stored.items():
        name = name.removeprefix("language_model.").replace("encoder.", "decoder.").replace("transformer.", "decoder.")
        if name == "word_embeddings_for_head.weight":
            continue  # a copy of the embedding, which the last pipeline stage has
        ours = {
            "embedding.word_embeddings.weight": "embedding.weight",
            "embedding.position_embeddings.weight": "position_embedding.weight",
            "decoder.final_layernorm.weight": "norm.weight",
            "decoder.final_layernorm.bias": "norm.bias",
            "decoder.final_norm.weight": "norm.weight",
            "output_layer.weight": "head.weight",
        }.get(name)
        layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
        if ours is None and name.startswith("decoder.layers."):
            for own, prefixes in names.items():
                for prefix in prefixes:
                    if rest in (f"{prefix}weight", f"{prefix}bias"):
                        ours = f"blocks.{layer}.{own}.{rest.removeprefix(prefix)}"
        for part, value in _parts(ours, weight, model, where).items() if ours else [(name, weight)]:
            found[part] = value
    if model.tie_embeddings:
        found.pop("head.weight", None)
    return found


def _parts(name: str, weight: Weight, model: ModelConfig, where: str) -> dict[str, Weight]:
    """One weight of theirs as ours: queries, keys and values in our order, a gate apart from the other half."""
    if ".attention.qkv." in name:
        rows = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
        if weight.shape[0] != rows:
            raise UserError(f"{where}: {name} has {weight.shape[0]} rows instead of {rows}; it is damaged")
        return {name: Weight(weight.shape, weight.dtype, lambda: _ungrouped(weight.read(), model))}
    if ".feedforward.up." in name and model.activation == "swiglu":
        half = model.ffn_size
        shape = (half, *weight.shape[1:])
        return {
            name.replace(".up.", ".gate."): Weight(shape, weight.dtype, lambda: weight.read()[:half].clone()),
            name: Weight(shape, weight.dtype, lambda: weight.read()[half:].clone()),
        }
    return {name: weight}


def _ungrouped(value: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """(groups x [query heads | key | value] x head_dim, ...) to [all queries | all keys | all values]."""
    groups, size = model.kv_heads, model.head_dim
    queries = model.num_attention_heads // groups
    parts = value.view(groups, queries + 2, size, *value.shape[1:]).split([queries, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, *value.shape[1:]) for part in parts])


def _entries(model: ModelConfig) -> list[Entry]:
    with torch.device("meta"):
        names = [name for name, _ in GPT(model).named_parameters()]
    return [Entry(name, (name,)) for name in names]
