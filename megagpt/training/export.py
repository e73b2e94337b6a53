"""An export of megagpt: a model without the rest of its run, which a new run, a conversion or a sampler can start from.

    config.yaml           the section `model`
    *.safetensors         the weights by this library's parameter names, in one file or several, in any floating type
    tokenizer.json        how tokens become text again, as in a run folder (and beside it the vocabulary's file, if any)

Every tensor is read when it is asked for; nothing in it is pickled. megagpt.convert writes exports.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from megagpt.config.schema import ModelConfig
from megagpt.config.yaml12 import parse
from megagpt.errors import UserError
from megagpt.training.weights import Weight

_FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_INTEGERS = {"BOOL", "U8", "I8", "I16", "I32", "I64"}


class Export(NamedTuple):
    """What `read_export` finds."""

    model: ModelConfig
    weights: dict[str, Weight]


def read_export(folder: Path, where: str) -> Export:
    """The export at `folder`; `where` begins the messages. Raises UserError for what is missing or damaged."""
    model = model_of(_model_section(folder / "config.yaml", where), where)
    return Export(model, read_safetensors(sorted(folder.glob("*.safetensors"))))


def read_safetensors(files: Sequence[Path], skips_integers: bool = False) -> dict[str, Weight]:
    """The tensors of safetensors files by name; integers (masks) are left out or refused.

    Raises UserError for damaged files, and for a name that comes twice.
    """
    weights: dict[str, Weight] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as content:
                for name in content.keys():  # noqa: SIM118 - it cannot be iterated over
                    if name in weights:
                        raise UserError(
                            f"{path}: has weight {name}, which a file beside it has, too; remove one of them"
                        )
                    stored = content.get_slice(name)
                    if skips_integers and stored.get_dtype() in _INTEGERS:
                        continue
                    if stored.get_dtype() not in _FLOATING:
                        raise UserError(
                            f"{path}: weight {name} is of type {stored.get_dtype()}; export it in fp32 or bf16"
                        )
                    dtype, shape = _FLOATING[stored.get_dtype()], tuple(stored.get_shape())
                    weights[name] = Weight(shape, dtype, partial(_read_tensor, path, name))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    return weights


def model_of(values: Any, where: str) -> ModelConfig:
    """The section `model` of a configuration or a checkpoint. Raises UserError for keys of another version."""
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, ("model", *problem["loc"])))
        raise UserError(f"{where}: this version of megagpt does not know its {key}: {problem['msg']}") from None


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, memory-mapped; the file is mapped for as long as the tensor is used."""
    try:
        with safe_open(path, framework="pt", device="cpu") as content:
            return content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy it again")


def _model_section(path: Path, where: str) -> Any:
    try:
        tree, _, _ = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: has safetensors, but no config.yaml; it is no export of megagpt") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "model" not in tree:
        raise UserError(f"{path}: has no section model; it is no export of megagpt")
    return tree["model"]
