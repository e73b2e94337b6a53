"""The same model, with the same weights, in the code of this project's peers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.convert import huggingface, nanogpt
from megagpt.errors import UsageError, UserError
from megagpt.model import GPT
from megagpt.training.weights import Weight, Weights


def weights_of(model: GPT) -> Weights:
    """A copy of a model's weights, by our names."""
    return {name: _held(value.detach().clone()) for name, value in model.state_dict().items()}


def transformers_model(config: ModelConfig, weights: Weights, dtype: torch.dtype) -> Any:
    """AutoModelForCausalLM of GPT-2 or Llama. Raises UsageError for what they cannot express."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weights = huggingface.expressed(config, weights)
    values = huggingface.config_of(config, dtype, {})
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    _load(theirs, huggingface.foreign_weights(config, weights))
    return theirs.to(dtype)


def nanogpt_model(path: Path, config: ModelConfig, weights: Weights) -> Any:
    """nanoGPT's GPT, in fp32. path: the model.py of a checkout.

    Raises UsageError for what it cannot express, UserError for a file that is none of its.
    """
    module = _imported(path)
    config, weights = nanogpt.expressed(_with_its_gelu(config), weights)
    theirs = module.GPT(module.GPTConfig(**nanogpt.arguments_of(config)))
    _load(theirs, nanogpt.foreign_weights(config, weights))
    return theirs


def check_peers(config: ModelConfig, transformers: bool, nanogpt_file: Path | None) -> None:
    """Raise UsageError where a peer cannot express `config`, UserError where it is not there."""
    if transformers:
        try:
            importlib.import_module("transformers")
        except ImportError as error:
            raise UserError(
                f"{error}; install it with pip install 'megagpt[export]', or do not compare with it"
            ) from error
        _check_expressed(huggingface.expressed, config)
    if nanogpt_file:
        _check_expressed(nanogpt.expressed, _with_its_gelu(config))
        _imported(nanogpt_file)


def _check_expressed(expressed: Callable[[ModelConfig, Weights], object], config: ModelConfig) -> None:
    """The conversion's refusal, without the name of its option."""
    try:
        expressed(config, {})
    except UsageError as error:
        raise UsageError(f"cannot compare: {str(error).partition(': ')[2]}") from None


def _with_its_gelu(config: ModelConfig) -> ModelConfig:
    """nanoGPT has the exact one, which takes as long as GPT-2's approximation."""
    return config.model_copy(update={"activation": "gelu"}) if config.activation == "gelu_tanh" else config


def _held(value: Tensor) -> Weight:
    return Weight(tuple(value.shape), value.dtype, lambda: value)


def _load(model: nn.Module, weights: Weights) -> None:
    """The second name of a tied weight may be missing, no other."""
    state = {name: weight.read() for name, weight in weights.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found
    assert set(found.missing_keys) <= {"lm_head.weight"}, found


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    try:
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the model.py of a checkout of nanoGPT") from None
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{path}: {error}; give the model.py of a checkout of nanoGPT") from None
    if not hasattr(module, "GPTConfig"):
        raise UserError(f"{path}: has no GPTConfig; give the model.py of a checkout of nanoGPT")
    return module
