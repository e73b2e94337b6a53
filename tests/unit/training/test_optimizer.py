"""Muon against torch's own, whole and in parts; the groups of both optimizers; steps that must change nothing."""

import copy
import threading
from collections import defaultdict
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt.config.schema import OptimizerConfig, RunConfig
from megagpt.model import GPT, initialize_weights, parameter_kind, stacked_heights
from megagpt.training import optimizer as module
from megagpt.training.optimizer import apply_settings, build_optimizer, orthogonalized, parameter_groups
from tests.unit.model.configs import GPT2, LLAMA

MUON = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.3)


def built(config: OptimizerConfig, model_config=LLAMA, precision: str = "fp32"):
    model = GPT(model_config)
    initialize_weights(model, 0)
    groups = parameter_groups(model, config, parameter_kind, lambda name: stacked_heights(name, model_config))
    return model, build_optimizer(groups, config, precision)


def set_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, optimizer = built(MUON)
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden, *others = optimizer.param_groups
    found = {names[parameter] for parameter in hidden["params"]}
    parts = ("attention.qkv", "attention.out", "feedforward.up", "feedforward.gate", "feedforward.down")
    assert found == {f"blocks.{layer}.{part}.weight" for layer in range(3) for part in parts}
    assert {names[p] for group in others for p in group["params"]} == set(names.values()) - found
    by_name = dict(zip((names[p] for p in hidden["params"]), hidden["matrices"], strict=True))
    assert by_name["blocks.1.attention.qkv.weight"] == [(60, 60), (20, 60), (20, 60)]
    assert by_name["blocks.1.feedforward.down.weight"] == [(60, 83)]
    assert hidden["weight_decay"] == 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_steps_are_torchs_muon_steps_and_fp32_near_them(precision):
    model, optimizer = built(MUON, GPT2, precision)
    reference = copy.deepcopy(model)
    for name, parameter in reference.named_parameters():
        parts = (parameter,)
        if parameter_kind(name) == "matrix":
            parts = parameter.detach().split(stacked_heights(name, GPT2) or [len(parameter)])
        parameter.parts = parts
    hidden = [part for n, p in reference.named_parameters() if parameter_kind(n) == "matrix" for part in p.parts]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(reference, seed)
        for parameter in reference.parameters():
            for part, grad in zip(
                parameter.parts, parameter.grad.split([len(p) for p in parameter.parts]), strict=True
            ):
                part.grad = grad
        optimizer.step()
        muon.step()
    moved = GPT(GPT2)
    initialize_weights(moved, 0)
    for (name, parameter), expected, start in zip(
        model.named_parameters(), reference.parameters(), moved.parameters(), strict=True
    ):
        if parameter_kind(name) == "matrix":
            error = (parameter - expected).norm() / (expected - start).norm()
            assert error < (1e-6 if precision == "bf16" else 0.02), name


@pytest.mark.parametrize("shape", [(40, 40), (7, 90), (90, 7), (1, 5)])
def test_orthogonalized_keeps_the_directions_and_evens_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = orthogonalized(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = u.T @ found @ v.T
    assert torch.linalg.norm(aligned - aligned.diag().diag()) < 1e-3
    large = s > 0.05 * s.max()
    assert ((aligned.diag()[large] > 0.6) & (aligned.diag()[large] < 1.3)).all()
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_updates_have_the_size_of_adamws():
    """Of AdamW's steps the root mean square is 0.2 to 0.4 lr, by Liu et al.; Muon's are made 0.2 lr."""
    model, optimizer = built(OptimizerConfig(name="muon", lr=1.0, weight_decay=0.0))
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if parameter_kind(name) == "matrix":
            for new_part, old_part in zip(
                *(p.detach().split(stacked_heights(name, LLAMA) or [len(p)]) for p in (parameter, old)), strict=True
            ):
                assert (new_part - old_part).square().mean().sqrt() == pytest.approx(0.2, rel=0.25), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("earlier_steps", [0, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1.0])
def test_a_step_with_found_inf_changes_neither_weights_nor_state(bad, earlier_steps, name):
    model, optimizer = built(MUON.model_copy(update={"name": name}))
    plain, plain_optimizer = built(MUON.model_copy(update={"name": name}))

    def step(seed: int, found_inf: Tensor | None) -> None:
        for each, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
            set_gradients(each, seed)
            its_optimizer.found_inf = found_inf if its_optimizer is optimizer else None
            its_optimizer.step()

    for seed in range(earlier_steps):
        step(seed, torch.tensor(0.0))
    set_gradients(model, 9)
    for parameter in model.parameters():
        parameter.grad[0] = bad
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)
        for key, value in optimizer.state[found].items():
            assert torch.equal(value, plain_optimizer.state[expected].get(key, torch.zeros_like(value))), key
    step(7, torch.tensor(0.0))
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_settings_of_the_configuration_replace_those_of_a_checkpoint():
    _, optimizer = built(MUON)
    state = optimizer.state_dict()
    changed = OptimizerConfig(name="muon", weight_decay=0.7, muon_momentum=0.5, betas=(0.1, 0.2), eps=1e-3)
    _, resumed = built(changed)
    resumed.load_state_dict(state)
    apply_settings(resumed.param_groups, changed)
    hidden, *others = resumed.param_groups
    assert (hidden["momentum"], hidden["weight_decay"]) == (0.5, 0.7)
    assert all((group["betas"], group["eps"]) == ((0.1, 0.2), 1e-3) for group in others)
    assert [group["weight_decay"] for group in others] == [0.7, 0.0]


def test_a_saved_and_loaded_optimizer_steps_on_alike():
    model, optimizer = built(MUON)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
    other, loaded = built(MUON)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (other, loaded)):
        set_gradients(each, 5)
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Operation(NamedTuple):
    op: str
    tensor: Tensor
    peer: int


class Threads:
    """torch.distributed's point-to-point calls among threads; `rank` is the thread's."""

    P2POp, isend, irecv = Operation, "send", "receive"

    def __init__(self, world_size: int) -> None:
        self.world_size, self.local = world_size, threading.local()
        self.queues: dict[tuple[int, int], SimpleQueue[Tensor]] = defaultdict(SimpleQueue)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.world_size

    def get_rank(self) -> int:
        return self.local.rank

    def batch_isend_irecv(self, operations: list[Operation]) -> list[Any]:
        for op, tensor, peer in operations:
            if op == self.isend:
                self.queues[self.local.rank, peer].put(tensor.clone())
        for op, tensor, peer in operations:
            if op == self.irecv:
                received = self.queues[peer, self.local.rank].get(timeout=10)
                assert received.shape == tensor.shape
                tensor.copy_(received)
        return []


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
    world_size=st.integers(1, 6),
    padding=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_ranks_with_parts_of_the_matrices_step_as_one_with_all(shapes, world_size, padding):
    count = sum(rows * columns for rows, columns in shapes)
    length = -(-(count + padding) // world_size)
    flat = torch.zeros(length * world_size)
    flat[:count] = torch.randn(count, generator=torch.Generator().manual_seed(0))
    expected, start = torch.zeros_like(flat), 0
    for rows, columns in shapes:
        piece = slice(start, start + rows * columns)
        update = 0.2 * max(rows, columns) ** 0.5 * orthogonalized(flat[piece].view(rows, columns))
        expected[piece] = update.reshape(-1)
        start += rows * columns

    network, failures = Threads(world_size), []

    def run(rank: int, part: Tensor) -> None:
        network.local.rank = rank
        try:
            module._orthogonalize_parts_(part, shapes, rank, torch.float32)
        except Exception as error:  # noqa: BLE001 - whatever it was, the test must see it
            failures.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dist", network)
        threads = [threading.Thread(target=run, args=(r, p)) for r, p in enumerate(flat.split(length))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    torch.testing.assert_close(flat, expected)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"zero_stage": 3}, "muon needs whole matrices, but parallel.zero_stage 3"),
        ({"zero_stage": 1, "offload_optimizer": True}, "muon multiplies matrices"),
    ],
)
def test_where_muon_cannot_work_it_is_refused_with_the_reason(parallel, words):
    tree = {"data": {"train": [{"path": "x"}]}, "optimizer": {"name": "muon"}, "parallel": parallel}
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate(tree)
    RunConfig.model_validate(tree | {"optimizer": {}})


def test_scaled_learning_rates_have_groups_of_their_own_and_the_decay_of_all():
    """A step decays by lr x lr_scale x the group's weight decay: the configuration's in every group."""
    config = OptimizerConfig(weight_decay=0.1)
    model = GPT(LLAMA)
    scales = {"matrix": 0.25}
    groups = parameter_groups(
        model, config, parameter_kind, scale_of=lambda name: scales.get(parameter_kind(name), 1.0)
    )
    assert [(group["decayed"], group["lr_scale"]) for group in groups] == [(True, 1.0), (True, 0.25), (False, 1.0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(0.1 if group["decayed"] else 0.0)


def test_groups_of_older_checkpoints_learn_at_the_rate_of_the_run():
    group = {"params": [], "decayed": True}
    apply_settings([group], OptimizerConfig(weight_decay=0.3))
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.3)
