"""Every element of every parameter is found again in the shards, however they were cut; unknown layouts are refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.training.shards import Layout, Shards, layout_of_cuts, layout_of_flat_groups

shapes_of_groups = st.lists(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=5), min_size=1, max_size=3
)


def named(shapes: list[list[list[int]]]) -> list[dict[str, torch.Size]]:
    return [
        {f"{group}.{number}": torch.Size(shape) for number, shape in enumerate(members)}
        for group, members in enumerate(shapes)
    ]


def joined(layout: Layout, name: str, flats: list[list[np.ndarray]]) -> list[int]:
    """The elements of a parameter, put together by its pieces from flats[rank][flat]."""
    pieces = layout[name]
    assert [piece.offset for piece in pieces] == [
        sum(piece.length for piece in pieces[:number]) for number in range(len(pieces))
    ]
    return [x for p in pieces for x in flats[p.rank][p.flat][p.start : p.start + p.length].tolist()]


@given(shapes_of_groups, st.integers(1, 5))
def test_parameters_cut_one_by_one_are_found(shapes, world_size):
    groups = named(shapes)
    flats = [[np.zeros(0) for _ in groups] for _ in range(world_size)]
    for number, group in enumerate(groups):
        for shape in group.values():
            padded = np.full(math.ceil(shape.numel() / world_size) * world_size, -1)
            padded[: shape.numel()] = np.arange(shape.numel())
            for rank, part in enumerate(np.split(padded, world_size)):
                flats[rank][number] = np.concatenate([flats[rank][number], part])
    layout = layout_of_cuts(groups, world_size)
    for group in groups:
        for name, shape in group.items():
            assert joined(layout, name, flats) == list(range(shape.numel()))


@given(shapes_of_groups, st.integers(1, 5), st.integers(0, 2), st.integers(0, 3))
def test_parameters_of_flat_groups_are_found(shapes, world_size, gap, further_padding):
    groups = named(shapes)
    flats: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    for group in groups:
        whole = np.concatenate([np.append(np.arange(shape.numel()), [-1] * gap) for shape in group.values()])
        padding = -len(whole) % world_size + further_padding * world_size
        for rank, part in enumerate(np.split(np.pad(whole, (0, padding)), world_size)):
            flats[rank].append(part)
    gaps = [[gap] * len(group) for group in groups] if gap else None
    layout = layout_of_flat_groups(groups, [len(part) for part in flats[0]], gaps)
    for group in groups:
        for name, shape in group.items():
            assert joined(layout, name, flats) == list(range(shape.numel()))


def write_stage_1(folder: Path, *states: dict[str, Any], optimizer: Any = None) -> None:
    """A 3 x 2 parameter `w`, cut into 4 and 2 elements (padded to 4), with an optimizer's state on two ranks."""
    weight = torch.arange(6.0)
    torch.save({"param_shapes": [{"w": torch.Size([3, 2])}], "module": {}}, folder / "mp_rank_00_model_states.pt")
    for rank, state in enumerate(states):
        content = {
            "single_partition_of_fp32_groups": [weight[:4] if rank == 0 else weight[4:]],
            "group_paddings": [0 if rank == 0 else 2],
            "base_optimizer_state": optimizer or {"state": {0: state}},
        }
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, path)


def test_any_state_of_the_size_of_the_weights_and_any_scalar_is_read(tmp_path):
    write_stage_1(
        tmp_path,
        {"momentum_buffer": torch.arange(4) * 10, "step": 7, "beta_product": torch.tensor(0.5)},
        {"momentum_buffer": torch.tensor([40, 50, 0, 0]), "step": 7, "beta_product": torch.tensor(0.5)},
    )
    state = Shards(tmp_path, zero_stage=1, world_size=2).read("w")
    assert state["fp32"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert state["momentum_buffer"].tolist() == [[0, 10], [20, 30], [40, 50]]
    assert state["momentum_buffer"].dtype == torch.int64
    assert state["step"] == 7
    assert isinstance(state["step"], int)
    assert state["beta_product"] == torch.tensor(0.5)


def test_optimizer_that_has_not_stepped_has_weights_only(tmp_path):
    write_stage_1(tmp_path, {}, {})
    assert Shards(tmp_path, zero_stage=1, world_size=2).read("w").keys() == {"fp32"}


@pytest.mark.parametrize(
    ("states", "optimizer", "what"),
    [
        # As DeepSpeed's Muon at stages 1 and 2 keeps it: of whole parameters, not of this rank's part.
        ([{"momentum_buffer": torch.zeros(6)}] * 2, None, "momentum_buffer"),
        ([{"history": [1.0, 2.0]}] * 2, None, "history"),
        ([{"exp_avg": torch.zeros(4)}, {}], None, "the optimizer's state of w"),
        ([{}, {"exp_avg": torch.zeros(4)}], None, "the optimizer's state of w"),
        ([{}, {}], [{"exp_avg": torch.zeros(4)}], "elastic_checkpoint"),
    ],
)
def test_state_that_lies_otherwise_is_refused_by_name(states, optimizer, what, tmp_path):
    write_stage_1(tmp_path, *states, optimizer=optimizer)
    with pytest.raises(UserError, match=what) as refusal:
        Shards(tmp_path, zero_stage=1, world_size=2).read("w")
    assert "continue with the number of ranks, ZeRO stage" in str(refusal.value)


def test_stage_0_file_without_parameter_names_is_refused(tmp_path):
    torch.save({"module": {"w": torch.zeros(2)}, "optimizer": {"state": {}}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="an earlier version of megagpt wrote it"):
        Shards(tmp_path, zero_stage=0, world_size=1)
