"""Choice of the next token against exact distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chisquare, kstest
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from megagpt.errors import UsageError
from megagpt.inference.sampling import Sampling, choose, draw, exponentials, sample_key

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


@pytest.mark.parametrize("by", ["key", "step"])
def test_draws_have_the_exact_distribution(by):
    n = 5000
    probabilities = Sampling(temperature=1.3).probabilities(LOGITS[None])
    numbers, same = torch.arange(n), torch.full((n,), sample_key("a seed"))
    keys, steps = (numbers, same * 0) if by == "key" else (same, numbers)
    counts = draw(probabilities.expand(n, -1), torch.arange(8), keys, steps).bincount(minlength=8)
    assert counts[7] == 0, "impossible"
    likely = [0, 1, 2, 3, 5, 6]
    expected = torch.tensor(reference(LOGITS.tolist(), 1.3, None, None), dtype=torch.float64)[likely]
    assert chisquare(counts[likely], expected / expected.sum() * counts[likely].sum()).pvalue > 1e-3


def test_random_times_are_exponential_and_no_two_rows_or_tokens_go_together():
    times = exponentials(torch.arange(200), torch.arange(200) % 7, torch.arange(300))
    assert kstest(times.flatten().numpy(), "expon").pvalue > 1e-3
    uniform = (-times).exp()
    for table in (uniform, uniform.T):
        correlations = torch.corrcoef(table).triu(1)
        assert correlations.abs().max() < 6 / table.shape[1] ** 0.5


def test_rounding_errors_of_the_logits_change_almost_no_draw():
    """Twice their size, whatever the size of the vocabulary: 20,000 draws among 1,000 tokens."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)).expand(20_000, -1).double()
    errors = 1e-5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = torch.arange(20_000)
    chosen = [draw(values.softmax(-1), torch.arange(1000), keys, keys) for values in (logits, logits + errors)]
    assert (chosen[0] != chosen[1]).sum() <= 3, "0.4 are expected"


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
@given(hnp.arrays("float32", (3, 17), elements=VALUES), st.floats(0, 1), st.floats(0.01, 1))
def test_min_p_and_top_p_are_those_of_transformers(logits, min_p, top_p):
    logits = torch.from_numpy(logits).double()
    expected = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    expected = MinPLogitsWarper(min_p)(None, expected).softmax(-1)
    found = Sampling(min_p=min_p, top_p=top_p).probabilities(logits)
    full = logits.softmax(-1)
    sums = full.sort(dim=-1, descending=True).values.cumsum(-1)
    at_border = (sums - top_p).abs().amin(-1) < 1e-9
    at_border |= (full / full.amax(-1, keepdim=True) - min_p).abs().amin(-1) < 1e-9
    at_border |= (full.sort(dim=-1).values.diff() == 0).any(-1)  # equals: which of them stays is open
    torch.testing.assert_close(found[~at_border], expected[~at_border])


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", (3, 17), elements=VALUES), st.floats(0, 1))
def test_min_p_keeps_the_likeliest_token_and_what_is_not_below_its_share(logits, min_p):
    logits = torch.from_numpy(logits)
    full, found = Sampling().probabilities(logits), Sampling(min_p=min_p).probabilities(logits)
    assert torch.equal(found > 0, (full >= min_p * full.amax(-1, keepdim=True)) & (full > 0))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(3, dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays("float32", (3, 17), elements=VALUES),
    hnp.arrays("int64", (3, 5), elements=st.integers(0, 16)),
    st.floats(0.1, 10),
)
def test_the_repetition_penalty_is_that_of_transformers(logits, ids, penalty):
    logits, ids = torch.from_numpy(logits), torch.from_numpy(ids)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    in_text = torch.zeros(3, 17, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(Sampling(repetition_penalty=penalty).penalized(logits, in_text, None), expected)


def test_the_frequency_penalty_counts():
    counts = torch.tensor([[0, 1, 3]])
    found = Sampling(frequency_penalty=0.5).penalized(torch.tensor([[1.0, 1.0, 1.0]]), None, counts)
    assert found.tolist() == [[1.0, 0.5, -0.5]]


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", (4, 9), elements=VALUES), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_only_possible_tokens_are_drawn(logits, key, step):
    probabilities = Sampling(top_p=0.9).probabilities(torch.from_numpy(logits))
    tokens = draw(probabilities, torch.arange(9), torch.full((4,), key), torch.full((4,), step))
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-310])
def test_temperature_zero_and_its_neighbourhood_choose_the_likeliest_token(temperature):
    probabilities = Sampling(temperature).probabilities(LOGITS[None])
    assert probabilities.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0]]


def test_keys_tell_samples_apart():
    keys = {sample_key(seed, name, index) for seed in range(3) for name in "ab" for index in range(5)}
    assert len(keys) == 30
    assert sample_key(1, "a", 2) == sample_key(1, "a", 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, but it is -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, but it is nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, but it is inf"),
        ({"top_k": 0}, "top-k must be 1 or more, but it is 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, but it is 0.0"),
        ({"min_p": 1.1}, "min-p must be 0 to 1, but it is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition penalty must be above 0, but it is 0.0"),
        ({"frequency_penalty": float("nan")}, "frequency penalty must be a finite number, but it is nan"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, but it is 1.5"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        Sampling(**values)


@pytest.mark.parametrize("vocab_size", [1008, 50257])
def test_compiled_draws_of_a_whole_vocabulary_are_the_plain_ones(vocab_size):
    sampling, vocabulary = Sampling(temperature=0.8), torch.arange(vocab_size)
    compiled = torch.compile(choose, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        logits = torch.randn(3, vocab_size, generator=generator)
        keys, steps = torch.arange(3) * 7919 + step, torch.full((3,), step)
        expected = choose(sampling, logits, keys, steps, vocabulary)
        assert torch.equal(compiled(sampling, logits, keys, steps, vocabulary), expected)
