"""DeepSpeed's shards read parameter by parameter: fp32 master weights and optimizer state, at every ZeRO stage.

A rank's file holds flat tensors, one an optimizer group (at stage 3 one a sub-group), in which parameters or pieces of
them lie one after another in the order of `param_shapes` (deepspeed 0.19): at stages 1 and 2 the whole group is padded
and cut into equal parts, at stage 3 every parameter on its own; at stage 0 nothing is cut. (`param_slice_mappings`, by
which DeepSpeed's own converter goes, are wrong with round_robin_gradients.) The files are memory-mapped: what is not
read costs no memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from megagpt.errors import UserError
from megagpt.training.torch_files import Inert, read_torch_file

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""The classes that DeepSpeed writes into its files, beside data: records, all of them."""
MASTER_WEIGHT = "fp32"
PARAMETER_NAMES = "parameter_names"
"""Key in the stage 0 file: names by optimizer group, in the order in which the optimizer numbers its parameters."""

State = dict[str, torch.Tensor | int | float]
"""Of one parameter: "fp32", the optimizer's tensors of the same shape, and its scalars (step)."""


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of a flattened parameter, at `start` in a rank's flat tensor number `flat`."""

    rank: int
    flat: int
    start: int
    offset: int
    length: int


Layout = dict[str, list[Piece]]
"""The pieces of each parameter by name, in order."""


def layout_of_flat_groups(
    shapes: Sequence[Mapping[str, torch.Size]], part_lengths: Sequence[int], gaps: Sequence[Sequence[int]] | None
) -> Layout:
    """Stages 1 and 2: from the parameters of each flat tensor, {name: shape}, and the length of its part on a rank.

    `gaps`: the padding after each parameter (DeepSpeed's parameter_alignment); None: no padding.
    """
    layout: Layout = {}
    for flat, (parameters, part_length) in enumerate(zip(shapes, part_lengths, strict=True)):
        position = 0
        for number, (name, shape) in enumerate(parameters.items()):
            pieces, offset = [], 0
            while offset < shape.numel():
                rank, start = divmod(position + offset, part_length)
                length = min(shape.numel() - offset, part_length - start)
                pieces.append(Piece(rank, flat, start, offset, length))
                offset += length
            layout[name] = pieces
            position += shape.numel() + (gaps[flat][number] if gaps else 0)
    return layout


def layout_of_cuts(shapes: Sequence[Mapping[str, torch.Size]], world_size: int) -> Layout:
    """Stage 3: from the parameters of each flat tensor, {name: whole shape}."""
    layout: Layout = {}
    for flat, parameters in enumerate(shapes):
        start = 0
        for name, shape in parameters.items():
            length = math.ceil(shape.numel() / world_size)
            offsets = range(0, shape.numel(), length)
            layout[name] = [
                Piece(rank, flat, start, offset, min(length, shape.numel() - offset))
                for rank, offset in enumerate(offsets)
            ]
            start += length
    return layout


class Shards:
    """The folder of shards that `world_size` ranks wrote at `zero_stage`.

    `shapes` has all parameters by name, `loss_scale` the factor of the loss if there is one (it matters in fp16 only).
    Raises UserError for a missing file, and for shards whose layout is not one of those above (some of DeepSpeed's own
    options change it).
    """

    shapes: dict[str, torch.Size]
    loss_scale: float | None

    def __init__(self, folder: Path, zero_stage: int, world_size: int) -> None:
        self._folder = folder
        model_states = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
        model = load_file(folder, model_states)
        if zero_stage == 0:
            self._take_whole(model)
            return
        files = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
        ranks = [load_file(folder, name)["optimizer_state_dict"] for name in files]
        self.loss_scale = getattr(ranks[0].get("loss_scaler"), "cur_scale", None)
        groups: list[dict[str, torch.Size]] = model["param_shapes"]
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        if zero_stage == 3:
            self._layout = layout_of_cuts(groups, world_size)
            self._flats = [self._join(rank["fp32_flat_groups"], rank["optimizer_state_dict"], []) for rank in ranks]
        else:
            first = ranks[0]  # padded only if it is the last, too; then all parts are its own, however long
            parts = zip(first["single_partition_of_fp32_groups"], first["group_paddings"], strict=True)
            part_lengths = [len(part) + padding for part, padding in parts]
            self._layout = layout_of_flat_groups(groups, part_lengths, first.get("param_alignment_paddings"))
            self._flats = [
                self._join(
                    rank["single_partition_of_fp32_groups"], rank["base_optimizer_state"], rank["group_paddings"]
                )
                for rank in ranks
            ]

    def read(self, name: str) -> State:
        """Everything of one parameter, in its own shape."""
        return {
            key: self.read_tensor(name, key) if isinstance(value, torch.dtype) else value
            for key, value in self.description(name).items()
        }

    def description(self, name: str) -> dict[str, torch.dtype | torch.Tensor | int | float]:
        """Everything of one parameter: a dtype for each tensor of its shape, and the optimizer's scalars."""
        first, *others = (self._flats[piece.rank][piece.flat] for piece in self._layout[name])
        if any(other.keys() != first.keys() for other in others):
            raise self._unknown_layout(f"the optimizer's state of {name}")
        return {key: value.dtype if is_cut(value) else value for key, value in first.items()}

    def read_tensor(self, name: str, key: str) -> torch.Tensor:
        """One of the tensors of one parameter, in its own shape."""
        return self._whole(name, key)

    def read_weight(self, name: str) -> torch.Tensor:
        """The fp32 master weight of one parameter, in its own shape."""
        return self._whole(name, MASTER_WEIGHT)

    def _whole(self, name: str, key: str) -> torch.Tensor:
        shape = self.shapes[name]
        parts = []
        for piece in self._layout[name]:
            if piece.rank >= len(self._flats):
                raise self._unknown_layout(f"{key} of {name}")
            flat = self._flats[piece.rank][piece.flat].get(key)
            if not is_cut(flat) or piece.start + piece.length > len(flat):
                raise self._unknown_layout(f"{key} of {name}")
            parts.append(flat[piece.start : piece.start + piece.length])
        whole = torch.cat(parts)
        if whole.numel() != shape.numel():
            raise self._unknown_layout(f"{key} of {name}")
        return whole.view(shape)

    def _take_whole(self, model: dict[str, Any]) -> None:
        if PARAMETER_NAMES not in model:
            raise UserError(
                f"{self._folder}: an earlier version of megagpt wrote it, without the optimizer's parameter names; "
                "continue with the number of ranks and ZeRO stage that wrote the checkpoint"
            )
        self.loss_scale = model.get("loss_scaler", {}).get("scale")
        names = [name for group in model[PARAMETER_NAMES] for name in group]
        self.shapes = {name: model["module"][name].shape for name in names}
        self._layout = {
            name: [Piece(0, number, 0, 0, shape.numel())] for number, (name, shape) in enumerate(self.shapes.items())
        }
        self._flats = [self._join([model["module"][name].flatten() for name in names], model["optimizer"], [])]

    def _join(self, weights: Sequence[torch.Tensor], optimizer: Any, paddings: Sequence[int]) -> list[dict[str, Any]]:
        """A rank's flat tensors with the optimizer's state of each; the weights may lack the padding at their end."""
        if not isinstance(optimizer, dict):
            raise self._unknown_layout("the optimizer's state (DeepSpeed's elastic_checkpoint)")
        joined = []
        for number, weight in enumerate(weights):
            state = optimizer["state"].get(number, {})
            flat = {key: value.flatten() if is_cut(value) else value for key, value in state.items()}
            lengths = {len(weight), len(weight) + (paddings[number] if paddings else 0)}
            for key, value in flat.items():
                if len(value) not in lengths if is_cut(value) else not isinstance(value, torch.Tensor | int | float):
                    raise self._unknown_layout(f"{key} of optimizer state {number}")
            joined.append({MASTER_WEIGHT: weight, **flat})
        return joined

    def _unknown_layout(self, what: str) -> UserError:
        return UserError(
            f"{self._folder}: {what} does not lie where this version of megagpt looks for it; continue with the number "
            "of ranks, ZeRO stage and section deepspeed that wrote the checkpoint"
        )


def is_cut(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a state belongs to the elements of parameters; the others are scalars."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def load_file(folder: Path, pattern: str) -> dict[str, Any]:
    """The content of the file that `pattern` names, memory-mapped. Raises UserError if it is not there, or not data."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder}: has no {pattern}; the checkpoint is damaged")
    return read_torch_file(found[0], dict.fromkeys(DEEPSPEED_CLASSES, Inert))
