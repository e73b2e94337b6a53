"""The tournament of nodes, and the rates of nccl-tests."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.scaling.fabric import Collective, tournament


@given(st.integers(2, 16))
def test_up_to_16_nodes_every_pair_meets_exactly_once(nodes):
    pairs = [pair for pairs in tournament(nodes) for pair in pairs]
    assert sorted(pairs) == list(combinations(range(nodes), 2))


@given(st.integers(2, 1100))
def test_pairs_of_a_round_are_disjoint_nobody_meets_twice_and_rounds_are_bounded(nodes):
    rounds = tournament(nodes)
    assert len(rounds) <= 16
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met)) == nodes - nodes % 2
        assert set(met) <= set(range(nodes))
    every = [pair for pairs in rounds for pair in pairs]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(("operation", "factor"), [("all-reduce", 1.75), ("all-gather", 0.875), ("broadcast", 1.0)])
def test_bus_bandwidths_are_those_of_nccl_tests(operation, factor):
    measured = Collective(operation, 8, 1_000_000, 0.01, 1e-5, intact=True)
    assert measured.algbw == pytest.approx(1e8)
    assert measured.busbw == pytest.approx(factor * 1e8)
