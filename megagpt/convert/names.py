"""Weights under other names: how a foreign format calls each parameter, and lays it out.

A format says it once, as a list of entries, and both directions follow. Matrices may be transposed, and a stack of
matrices (queries, keys, values) may lie apart. Nothing is read here: a weight is turned when it is read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError, UserError
from megagpt.training.weights import Weight, Weights


class Entry(NamedTuple):
    """One parameter of ours in a foreign format."""

    ours: str
    theirs: tuple[str, ...]
    """Its name there; three names if queries, keys and values lie apart there."""
    transposed: bool = False
    """Whether the matrix is stored as (in, out)."""


GPT2_EMBEDDINGS = [
    Entry("embedding.weight", ("transformer.wte.weight",)),
    Entry("position_embedding.weight", ("transformer.wpe.weight",)),
]
_GPT2_MODULES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "feedforward_norm": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}


def gpt2_modules(model: ModelConfig) -> list[tuple[str, str]]:
    """Each module of weight and bias, by our name and by GPT-2's, which nanoGPT has too."""
    blocks = [
        (f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{theirs}")
        for layer in range(model.num_layers)
        for ours, theirs in _GPT2_MODULES.items()
    ]
    return [*blocks, ("norm", "transformer.ln_f")]


def to_foreign(entries: Iterable[Entry], model: ModelConfig, weights: Weights) -> dict[str, Weight]:
    """The foreign format's weights, out of ours."""
    found: dict[str, Weight] = {}
    for entry in entries:
        weight = weights[entry.ours]
        if entry.transposed:
            weight = _transposed(weight)
        parts = [weight] if len(entry.theirs) == 1 else _split(weight, stacked_rows(model))
        found.update(zip(entry.theirs, parts, strict=True))
    return found


def from_foreign(
    entries: Iterable[Entry], stored: Weights, ignored: Callable[[str], bool], where: str
) -> dict[str, Weight]:
    """Our weights, out of the foreign format's.

    ignored: whether a name of theirs is none of a weight, as are causal masks. Raises UserError for a weight that is
    not there, and for one that no entry names.
    """
    found, used = {}, set()
    for entry in entries:
        for name in entry.theirs:
            if name not in stored:
                raise UserError(
                    f"{where}: has no weight {name}; it is damaged, or its configuration is of another model"
                )
            used.add(name)
        parts = [stored[name] for name in entry.theirs]
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            raise UserError(f"{where}: {', '.join(entry.theirs)} are of different types or widths; it is damaged")
        weight = parts[0] if len(parts) == 1 else _stacked(parts)
        found[entry.ours] = _transposed(weight) if entry.transposed else weight
    if unknown := sorted(name for name in stored if name not in used and not ignored(name)):
        raise UserError(
            f"{where}: has weight {unknown[0]}, which its kind of model does not have; it is of another architecture"
        )
    return found


def tied(stored: Weights, embedding: str, where: str) -> Weights:
    """Without the output head, which a format stores twice if it is tied. Raises UserError if the two differ."""
    if "lm_head.weight" not in stored:
        return stored
    if embedding in stored and not torch.equal(stored["lm_head.weight"].read(), stored[embedding].read()):
        raise UserError(
            f"{where}: its configuration ties the output head to the token embedding, but lm_head.weight differs from "
            f"{embedding}; correct the configuration if the head is one of its own"
        )
    return {name: weight for name, weight in stored.items() if name != "lm_head.weight"}


def check_expressible(model: ModelConfig, needed: Mapping[str, tuple[object, ...]], who: str) -> None:
    """Raises UsageError unless the model's properties are among those `needed`, with all of them that are not."""
    problems = [
        f"model.{_KEYS.get(key, key)} {getattr(model, key)} (it has {' and '.join(map(str, values))})"
        for key, values in needed.items()
        if getattr(model, key) not in values
    ]
    if problems:
        raise UsageError(f"{who} cannot express {', '.join(problems)}")


_KEYS = {"kv_heads": "num_kv_heads", "ffn_size": "ffn_hidden_size"}


def is_gpt2_mask(name: str) -> bool:
    """Whether a name of GPT-2's is that of a causal mask, which older versions saved as weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def stacked_rows(model: ModelConfig) -> list[int]:
    """Rows of queries, keys and values in our stack of them."""
    return [heads * model.head_dim for heads in (model.num_attention_heads, model.kv_heads, model.kv_heads)]


def _transposed(weight: Weight) -> Weight:
    return Weight(weight.shape[::-1], weight.dtype, lambda: weight.read().t().contiguous())


def _split(weight: Weight, rows: Sequence[int]) -> list[Weight]:
    def part(index: int) -> Weight:
        start = sum(rows[:index])
        shape = (rows[index], *weight.shape[1:])
        return Weight(shape, weight.dtype, lambda: weight.read()[start : start + rows[index]].clone())

    return [part(index) for index in range(len(rows))]


def _stacked(parts: Sequence[Weight]) -> Weight:
    rows = sum(part.shape[0] if part.shape else 0 for part in parts)
    return Weight((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))
