"""Coordinate check of muP (Yang et al. 2022, app. D.1): do a few steps change activations alike at all widths?

The first size of a study is made 1, 2, 4 and 8 times as wide (more heads of the same size) and trained for some steps
on one batch of its own data. What is recorded is how far the activations of that batch are from their initial values:
the root mean square over batch, positions and channels. Under muP it does not depend on the width: its exponent in the
width, the slope of a line through logarithms, is near 0. Under the standard parametrisation with one learning rate for
all widths it grows. It costs some seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig, RunConfig
from megagpt.data.indexed import IndexedDataset
from megagpt.errors import UserError
from megagpt.model import GPT, initialize_weights, learning_rate_scale, parameter_kind, stacked_heights
from megagpt.model.gpt import Block
from megagpt.training.optimizer import build_optimizer, parameter_groups

MULTIPLES = (1, 2, 4, 8)
STEPS = 8
SEQUENCES = 8
FLAT = 0.2
"""Largest exponent, up or down, that counts as no dependence on the width."""

PLACES = ("attention", "feed-forward", "residual stream", "logits")


@dataclass(frozen=True)
class Coordinates:
    """The changes of activations in one parametrisation."""

    parametrisation: str
    """mup or standard."""
    widths: list[int]
    changes: dict[str, list[float]]
    """Root mean squares by place and width, after the last step."""

    @property
    def exponents(self) -> dict[str, float]:
        """Of the changes in the width, by place."""
        x = np.log(self.widths)
        return {place: float(np.polyfit(x, np.log(values), 1)[0]) for place, values in self.changes.items()}

    @property
    def is_flat(self) -> bool:
        """Whether no change depends on the width."""
        return all(abs(exponent) <= FLAT for exponent in self.exponents.values())

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def check_coordinates(config: RunConfig, multiples: Sequence[int] = MULTIPLES, seeds: int = 2) -> list[Coordinates]:
    """The check of the first size of a study under muP and under the standard parametrisation, on the CPU.

    Raises UserError if the training data have fewer tokens than one batch.
    """
    tokens = _batch(config)
    found = []
    for parametrisation in ("mup", "standard"):
        changes: dict[str, list[float]] = {place: [] for place in PLACES}
        models = [_widened(config.model, multiple, parametrisation == "mup") for multiple in multiples]
        for model in models:
            runs = [_changes(config, model, tokens, seed) for seed in range(seeds)]
            for place in PLACES:
                changes[place].append(float(np.mean([run[place] for run in runs])))
        found.append(Coordinates(parametrisation, [model.hidden_size for model in models], changes))
    return found


def _batch(config: RunConfig) -> Tensor:
    """(SEQUENCES, seq_len + 1) int64."""
    size = SEQUENCES * (config.seq_len + 1)
    path = config.data.train[0].path
    dataset = IndexedDataset(path)
    if dataset.num_tokens < size:
        raise UserError(f"{path}: {dataset.num_tokens} tokens, but the check needs {size}")
    return torch.from_numpy(np.asarray(dataset.tokens(0, size)).astype(np.int64)).view(SEQUENCES, -1)


def _widened(model: ModelConfig, multiple: int, mup: bool) -> ModelConfig:
    return model.model_copy(
        update={
            "hidden_size": model.hidden_size * multiple,
            "num_attention_heads": model.num_attention_heads * multiple,
            "num_kv_heads": model.num_kv_heads and model.num_kv_heads * multiple,
            "ffn_hidden_size": model.ffn_size * multiple,
            "mup_base_width": model.hidden_size if mup else None,
        }
    )


def _changes(config: RunConfig, model_config: ModelConfig, tokens: Tensor, seed: int) -> dict[str, float]:
    """How far activations are from their initial values after STEPS steps, by place."""
    model = GPT(model_config)
    initialize_weights(model, seed)
    heights, scales = partial(stacked_heights, config=model_config), partial(learning_rate_scale, config=model_config)
    groups = parameter_groups(model, config.optimizer, parameter_kind, heights, scales)
    optimizer = build_optimizer(groups, config.optimizer, "fp32")
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * group["lr_scale"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = _activations(model, inputs)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        (model(inputs, targets) / targets.numel()).backward()
        optimizer.step()
    after = _activations(model, inputs)
    return {place: (after[place] - before[place]).pow(2).mean().sqrt().item() for place in PLACES}


@torch.no_grad()
def _activations(model: GPT, inputs: Tensor) -> dict[str, Tensor]:
    """By place: what attention and feed-forward of each block add, (layers, batch, seq, hidden), what the last block
    hands on, and the logits."""
    found: dict[str, list[Tensor]] = {place: [] for place in PLACES}

    def record(place: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: found[place].append(output)

    hooks = [model.blocks[-1].register_forward_hook(record("residual stream"))]
    for block in model.blocks:
        assert isinstance(block, Block)
        hooks.append(block.attention.register_forward_hook(record("attention")))
        hooks.append(block.feedforward.register_forward_hook(record("feed-forward")))
    found["logits"].append(model(inputs))
    for hook in hooks:
        hook.remove()
    return {place: torch.stack(outputs) for place, outputs in found.items()}
