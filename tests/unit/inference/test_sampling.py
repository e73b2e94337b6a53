"""Choice of the next token against exact distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chisquare

from megagpt.errors import UsageError
from megagpt.inference.sampling import Sampling, draw, sample_generators, uniforms

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.9, -30.0, 0.0, 1.0, float("-inf")])


def reference(logits, temperature, top_k, top_p):
    """In plain Python: the kept tokens and their probabilities."""
    peak = max(logits)
    weights = [pow(2.718281828459045, (value - peak) / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if top_p is None or mass < top_p:
            kept.append(i)
            mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.7, 0.999])
def test_probabilities_are_the_filtered_and_tempered_softmax(temperature, top_k, top_p):
    found = Sampling(temperature, top_k, top_p).probabilities(LOGITS[None])[0]
    assert found.tolist() == pytest.approx(reference(LOGITS.tolist(), temperature, top_k, top_p), abs=1e-9)


def test_draws_have_the_exact_distribution():
    n = 20_000
    probabilities = Sampling(temperature=1.3).probabilities(LOGITS[None])
    numbers = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(probabilities.expand(n, -1), numbers).bincount(minlength=8)
    assert counts[7] == 0, "impossible"
    likely = [0, 1, 2, 3, 5, 6]
    expected = torch.tensor(reference(LOGITS.tolist(), 1.3, None, None), dtype=torch.float64)[likely]
    assert chisquare(counts[likely], expected / expected.sum() * counts[likely].sum()).pvalue > 1e-3


VALUES = st.floats(-50, 50, width=32)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", (3, 17), elements=VALUES), st.integers(1, 20), st.floats(0.01, 1))
def test_top_k_keeps_k_and_top_p_the_smallest_set_that_reaches_p(logits, k, p):
    logits = torch.from_numpy(logits)
    full = Sampling().probabilities(logits)
    by_k = Sampling(top_k=k).probabilities(logits)
    assert ((by_k > 0).sum(dim=-1) <= k).all()
    by_p = Sampling(top_p=p).probabilities(logits)
    for everything, kept in zip(full, by_p > 0, strict=True):
        mass = everything[kept].sum().item()
        assert mass >= p - 1e-9 or kept.all()
        assert mass - everything[kept].min().item() < p + 1e-9, "one token fewer would not reach p"
        assert not kept.all() or kept.numel() == 17
        if not kept.all():
            assert everything[kept].min() >= everything[~kept].max()
    for filtered in (by_k, by_p):
        torch.testing.assert_close(filtered.sum(dim=-1), torch.ones(3, dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", (4, 9), elements=VALUES), st.sampled_from([0.0, 1 - 2**-53]))
def test_extreme_uniform_numbers_draw_possible_tokens(logits, uniform):
    probabilities = Sampling(top_p=0.9).probabilities(torch.from_numpy(logits))
    tokens = draw(probabilities, torch.full((4,), uniform, dtype=torch.float64))
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-310])
def test_temperature_zero_and_its_neighbourhood_choose_the_likeliest_token(temperature):
    probabilities = Sampling(temperature).probabilities(LOGITS[None])
    assert probabilities.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0]]


def test_a_samples_random_numbers_depend_on_seed_and_number_only():
    alone = [uniforms(sample_generators(7, 1)) for _ in range(2)]
    beside = uniforms(sample_generators(7, 5))
    assert torch.equal(*alone)
    assert beside[0] == alone[0][0]
    assert len(set(beside.tolist())) == 5
    assert uniforms(sample_generators(8, 1)) != alone[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, but it is -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, but it is nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, but it is inf"),
        ({"top_k": 0}, "top-k must be 1 or more, but it is 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, but it is 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, but it is 1.5"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        Sampling(**values)
