"""fp32 master weights out of DeepSpeed's shards, for every ZeRO stage and precision, on one CPU.

DeepSpeed's own zero_to_fp32 does the same but for bf16 at stage 1, whose files it does not recognise. What the shards
hold (deepspeed 0.19): at stage 0 the weights themselves; at stages 1 and 2 each optimizer group flattened, padded at
its end and cut into one part a rank; at stage 3 every parameter cut on its own, its last part padded to equal length.
The files are memory-mapped, so the optimizer's moments are never read.
"""

import io
import logging
import math
import pickle
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from megagpt.errors import UserError

logger = logging.getLogger(__name__)


def read_weights(shards: Path, zero_stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """fp32 tensors by parameter name from the folder `shards`, which `world_size` ranks wrote at `zero_stage`.

    Unpickles: only for checkpoints that are trusted. Raises UserError if a file is missing.
    """
    if zero_stage == 0:
        return {name: tensor.float() for name, tensor in _load(shards, "mp_rank_00_model_states.pt")["module"].items()}
    ranks = [_load(shards, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(world_size)]
    states = [rank["optimizer_state_dict"] for rank in ranks]
    model_states = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
    groups: list[dict[str, torch.Size]] = _load(shards, model_states)["param_shapes"]
    if zero_stage == 3:
        shapes = {name: shape for group in groups for name, shape in group.items()}
        return _join_cut_parameters([torch.cat(state["fp32_flat_groups"]) for state in states], shapes)
    weights: dict[str, torch.Tensor] = {}
    for number, shapes in enumerate(groups):
        flat = torch.cat([state["single_partition_of_fp32_groups"][number] for state in states])
        weights |= _split_flat_group(flat, shapes)
    return weights


def _split_flat_group(flat: torch.Tensor, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    weights, start = {}, 0
    for name, shape in shapes.items():
        weights[name] = flat[start : start + shape.numel()].view(shape).clone()
        start += shape.numel()
    return weights


def _join_cut_parameters(parts: list[torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    weights, start = {}, 0
    for name, shape in shapes.items():
        length = math.ceil(shape.numel() / len(parts))
        whole = torch.cat([part[start : start + length] for part in parts])
        weights[name] = whole[: shape.numel()].view(shape)
        start += length
    return weights


def _load(folder: Path, pattern: str) -> dict[str, Any]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder}: has no {pattern}; the checkpoint is damaged")
    chatter = io.StringIO()  # unpickling imports DeepSpeed, which prints
    with redirect_stdout(chatter), redirect_stderr(chatter):
        try:
            content = torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{found[0]}: not a file that torch saved ({reason}); the checkpoint is damaged") from error
    if chatter.getvalue():
        logger.info("%s", chatter.getvalue())
    return content
