"""The weights that a new run starts from (`train.init_from`), at every ZeRO stage and precision.

They come from a run folder (its newest checkpoint), a checkpoint, or an export: a folder with config.yaml, which has
the section `model`, and *.safetensors, one or several, with this library's parameter names. fp32 values arrive in the
fp32 master weights unrounded: DeepSpeed makes those from the model's 16-bit weights, so they are set once more after
it. One tensor at a time is read.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.utils
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from megagpt.config.compatibility import weight_differences
from megagpt.config.schema import ModelConfig
from megagpt.data.manifest import TokenizerInfo
from megagpt.errors import UsageError, UserError
from megagpt.model.gpt import GPT
from megagpt.model.init import Gather
from megagpt.training.checkpoint import SHARDS, find_checkpoint, read_manifest, verify_checksums
from megagpt.training.export import model_of, read_export
from megagpt.training.weights import Weights, check_weights, open_weights, without_padding

InitialWeights = Callable[[str], Tensor]
"""The fp32 value of the parameter of this name, on the CPU."""


class _Source(NamedTuple):
    """Weights at some place, and what is said of them there."""

    model: ModelConfig
    weights: Weights
    tokenizer: Path
    """File that describes the tokenizer, if it exists."""


def open_initial_weights(
    path: Path, model: ModelConfig, tokenizer: TokenizerInfo | None, part: int = 0, parts: int = 1
) -> InitialWeights:
    """The weights at `path`, checked to be those of `model`: names, shapes, and what gives them their meaning.

    tokenizer: that of the run's data, if it is known. part, parts: of `parts` ranks each compares the checksums of its
    share of a checkpoint's files.

    Raises:
        UsageError: they are of another model, or of another tokenizer.
        UserError: there are none, or they are damaged.
    """
    where = f"train.init_from {path}"
    if any(path.glob("*.safetensors")):
        source = _Source(*without_padding(*read_export(path, where)), path / "tokenizer.json")
    else:
        source = _open_checkpoint(path, where, part, parts)
    plain = model.without_padding()
    if different := weight_differences(source.model, plain):
        texts = ", ".join(f"model.{key} is {there} there and {here} here" for key, (there, here) in different.items())
        raise UsageError(f"{where}: is of another model: {texts}; set the section model as it is there")
    _check_tokenizer(source.tokenizer, tokenizer, where)
    check_weights(source.weights, plain, where)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(model).named_parameters()}
    return lambda name: _padded(source.weights[name].read().float(), shapes[name])


@torch.no_grad()
def copy_weights(model: GPT, weights: InitialWeights, gather: Gather = nullcontext) -> None:
    """Set every parameter of `model` in place; `gather` as for `initialize_weights`."""
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            parameter.copy_(weights(name))


@torch.no_grad()
def copy_master_weights(module: nn.Module, weights: InitialWeights) -> None:
    """Set the fp32 master weights that DeepSpeed has beside the parameters of `module`, at ZeRO stages 1 to 3."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            deepspeed.utils.safe_set_local_fp32_param(parameter, _shard_of(parameter, weights(name)))
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, weights(name))


def _shard_of(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a parameter at ZeRO stage 3: (elements), the last rank's padded, which DeepSpeed's own
    function for whole parameters does not do."""
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padding = size * dist.get_world_size(group) - value.numel()
    return F.pad(value.flatten(), (0, padding)).narrow(0, size * dist.get_rank(group), size)


def _open_checkpoint(path: Path, where: str, part: int, parts: int) -> _Source:
    """A run folder's newest checkpoint, or one by itself."""
    try:
        checkpoint = find_checkpoint(path)
        manifest = read_manifest(checkpoint)
        verify_checksums(checkpoint, part, parts)
        weights = open_weights(checkpoint / SHARDS, manifest.zero_stage, manifest.world_size)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    tokenizer = checkpoint.resolve().parent.parent / "tokenizer.json"
    return _Source(*without_padding(model_of(manifest.model, where), weights), tokenizer)


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """With the rows of zeros that pad the vocabulary here."""
    return value if value.shape == shape else F.pad(value, (0, 0, 0, shape[0] - len(value)))


def _check_tokenizer(path: Path, tokenizer: TokenizerInfo | None, where: str) -> None:
    """UsageError if `path` describes another tokenizer; a file of another program by this name says nothing."""
    if tokenizer is None or not path.is_file():
        return
    try:
        there = TokenizerInfo.model_validate_json(path.read_bytes())
    except ValidationError:
        return
    if (there.vocab_sha256, there.eod_id) != (tokenizer.vocab_sha256, tokenizer.eod_id):
        raise UsageError(
            f"{where}: knows tokenizer {there.name} ({there.vocab_sha256[:12]}...), but the data was made with "
            f"{tokenizer.name} ({tokenizer.vocab_sha256[:12]}...); make the data with the tokenizer of the weights"
        )
