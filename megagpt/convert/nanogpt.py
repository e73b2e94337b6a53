"""nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT), in both directions: GPT-2's names, matrices as ours.

    {"model": tensors by name, "model_args": n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout, ...}

Its network is GPT-2's with exact GELU, tied embeddings and, if bias is false, no biases at all. It says nothing of the
tokenizer. What is written has weights only: sample.py reads it, train.py cannot resume from it.
"""

from collections.abc import Mapping
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
from megagpt.convert.writing import Report
from megagpt.data.atomic import fsync_path
from megagpt.errors import UsageError, UserError
from megagpt.training.export import model_of
from megagpt.training.torch_files import read_torch_file
from megagpt.training.weights import Weight, Weights

FILE = "ckpt.pt"
_COMPILED = "_orig_mod."  # what torch.compile puts before names


def read_file(path: Path) -> tuple[ModelConfig, dict[str, Weight]]:
    """The model of nanoGPT's file at `path`, and its weights by our names. Raises UserError or UsageError."""
    content = read_torch_file(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model_args"), Mapping):
        raise UserError(f"{path}: has no model_args; it is no checkpoint of nanoGPT")
    model = _model(content["model_args"], str(path))
    del content
    stored = {
        name.removeprefix(_COMPILED): weight
        for name, weight in read_torch_weights([path], lambda content: content["model"]).items()
    }
    entries = _entries(model)
    return model, from_foreign(entries, tied(stored, entries[0].theirs[0], str(path)), is_gpt2_mask, str(path))


def expressed(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The model as it is. Raises UsageError with all that nanoGPT cannot express."""
    needed = {
        "position": ("learned",),
        "norm": ("layernorm",),
        "norm_eps": (1e-5,),
        "activation": ("gelu",),
        "tie_embeddings": (True,),
        "kv_heads": (model.num_attention_heads,),
        "ffn_size": (4 * model.hidden_size,),
    }
    check_expressible(model, needed, "--to nanogpt: nanoGPT")
    return model, weights


def arguments_of(model: ModelConfig) -> dict[str, Any]:
    """Of nanoGPT's GPTConfig, for a model that was `expressed`."""
    return {
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_embd": model.hidden_size,
        "block_size": model.max_seq_len,
        "bias": model.bias,
        "vocab_size": model.vocab_size,
        "dropout": model.dropout,
    }


def foreign_weights(model: ModelConfig, weights: Weights) -> dict[str, Weight]:
    """Our weights (of a model that was `expressed`) by nanoGPT's names."""
    return to_foreign(_entries(model), model, weights)


def write_file(path: Path, model: ModelConfig, weights: Weights, report: Report) -> None:
    """nanoGPT's file of a model that was `expressed`; holds all of its weights in memory, as the file is one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in foreign_weights(model, weights).items():
        tensors[name] = weight.read()
        report(weight.nbytes)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    try:
        torch.save({"model": tensors, "model_args": arguments_of(model)}, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error
    fsync_path(path)


def _model(arguments: Mapping[str, Any], where: str) -> ModelConfig:
    sizes = {
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "block_size": "max_seq_len",
        "vocab_size": "vocab_size",
    }
    if unknown := sorted(arguments.keys() - sizes.keys() - {"bias", "dropout"}):
        raise UsageError(
            f"{where}: its model_args have {unknown[0]}, which nanoGPT itself does not; it is another model"
        )
    if lacking := sorted(sizes.keys() - arguments.keys()):
        raise UserError(f"{where}: its model_args lack {lacking[0]}")
    values = {ours: arguments[theirs] for theirs, ours in sizes.items()} | {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "bias": arguments.get("bias", True),  # earlier versions always had them
        "tie_embeddings": True,
        "dropout": float(arguments.get("dropout", 0.0)),
    }
    return model_of(values, where)


def _entries(model: ModelConfig) -> list[Entry]:
    leaves = ("weight", "bias") if model.bias else ("weight",)
    return GPT2_EMBEDDINGS + [
        Entry(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for ours, theirs in gpt2_modules(model) for leaf in leaves
    ]
