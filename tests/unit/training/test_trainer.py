"""Dropout's random numbers belong to a step and a rank."""

import torch

from megagpt.training.trainer import seed_dropout


def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
    seed_dropout(seed, step, rank)
    return tuple(torch.rand(4).tolist())


def test_every_seed_step_and_rank_draws_its_own_numbers_and_the_same_ones_again():
    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 12) for rank in (0, 1, 2)]
    first = {place: drawn(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert {place: drawn(*place) for place in reversed(places)} == first
