"""Logits of a model that never is in memory whole: each layer's weights are read as it is reached, and let go after it.

Our own GPT, or the model class of transformers that a Hugging Face folder names: what others will run.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.convert.huggingface import read_config, stored_weights
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.training.weights import Weights

Logits = Callable[[Tensor], Tensor]
"""Token ids (batch, seq) to logits (batch, seq, vocab), fp32."""


def gpt_logits(model: ModelConfig, weights: Weights) -> Logits:
    """Logits of our GPT with these weights, computed in fp32."""
    with torch.device("meta"):
        gpt = GPT(model).eval()
    head = gpt.embedding if model.tie_embeddings else gpt.head
    name = "embedding.weight" if model.tie_embeddings else "head.weight"

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        # The head's weights are read outside its own forward, after the last norm.
        last = gpt.norm.register_forward_hook(lambda *_: _put(head, "weight", weights[name].read().float()))
        try:
            with _streamed(gpt, weights):
                return gpt(ids)
        finally:
            last.remove()
            _put(head, "weight", torch.empty(weights[name].shape, device="meta"))

    return logits


def transformers_logits(folder: Path) -> Logits:
    """Logits of the Hugging Face folder by transformers, computed in fp32. Raises UserError without transformers."""
    require_transformers()
    read_config(folder)
    stored = dict(stored_weights(folder))
    with _quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
        for parent in list(model.modules()):
            if hasattr(parent, "rotary_emb"):  # its table of frequencies is no weight, but computed when it is made
                parent.rotary_emb = type(parent.rotary_emb)(config=config)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if config.tie_word_embeddings:
        embedding = next(name for name in names if name.endswith(("wte.weight", "embed_tokens.weight")))
        stored["lm_head.weight"] = stored.get("lm_head.weight") or stored[_stored_name(embedding, stored)]
    weights = {name: stored[_stored_name(name, stored)] for name in names}

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        with _streamed(model, weights):
            return model(ids, use_cache=False).logits

    return logits


def require_transformers() -> None:
    """Raises UserError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("comparing with transformers needs pip install 'megagpt[export]'; or give --no-verify")


def _stored_name(name: str, stored: Mapping[str, Any]) -> str:
    """GPT-2's own files leave the first part of the name away."""
    return name if name in stored else name.removeprefix("transformer.")


@contextmanager
def _streamed(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Give each module its own parameters for as long as its forward runs."""
    handles = []
    for name, module in model.named_modules():
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        if not own:
            continue

        def load(module: nn.Module, *_: Any, prefix: str = f"{name}.", own: list[str] = own) -> None:
            for leaf in own:
                _put(module, leaf, weights[prefix + leaf].read().float())

        def release(module: nn.Module, *_: Any, prefix: str = f"{name}.", own: list[str] = own) -> None:
            for leaf in own:
                _put(module, leaf, torch.empty(weights[prefix + leaf].shape, device="meta"))

        handles += [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers prints while it is imported."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
