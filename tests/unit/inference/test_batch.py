"""Rows that are decoded together: against transformers, and against each sample alone."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from megagpt.config import ModelConfig
from megagpt.errors import UsageError
from megagpt.inference.batch import Batch, Sample, longest, run, worth_compiling
from megagpt.inference.generate import generate
from megagpt.inference.sampling import Sampling, sample_key
from tests.unit.model.configs import FAMILIES, build, tokens
from tests.unit.model.test_parity import CASES

LENGTHS = [1, 7, 2, 19, 7, 30, 3, 1, 12]


def prompts_of(config: ModelConfig, lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [tokens(config, batch=1, seq=length, seed=index)[0].tolist() for index, length in enumerate(lengths)]


def drawn(model, prompts, sampling, *, rows, max_tokens=10, max_len=40, stop_id=None):
    samples = [Sample(prompt, sample_key(0, index), max_tokens, stop_id) for index, prompt in enumerate(prompts)]
    for _ in run(Batch(model, sampling, rows, max_len), iter(samples)):
        pass
    return samples


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@torch.no_grad()
def test_greedy_output_of_ragged_prompts_is_that_of_transformers(family, penalty):
    config, convert = CASES[family]
    model = build(config)
    hf = convert(model)
    prompts = prompts_of(config)
    found = drawn(model, prompts, Sampling(temperature=0, repetition_penalty=penalty), rows=4)
    for prompt, sample in zip(prompts, found, strict=True):
        expected = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]),
        )
        assert sample.tokens == expected[0, len(prompt) :].tolist()
        logprobs = hf(expected).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        of_drawn = logprobs.gather(1, expected[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs), of_drawn, atol=1e-4, rtol=0)
        assert sample.ended == "length"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.8, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3)],
    ids=["plain", "everything"],
)
def test_a_sample_is_the_same_whatever_it_runs_beside(family, sampling):
    """In fp32: alone, in a small batch with refills, in one large batch, in another order."""
    model = build(FAMILIES[family])
    prompts = prompts_of(model.config)
    one, three, all_rows = (drawn(model, prompts, sampling, rows=rows, stop_id=5) for rows in (1, 3, 9))
    expected = [sample.tokens for sample in one]
    assert [sample.tokens for sample in three] == expected
    assert [sample.tokens for sample in all_rows] == expected
    reverse = [Sample(prompts[index], sample_key(0, index), 10, 5) for index in reversed(range(9))]
    for _ in run(Batch(model, sampling, 4, 40), iter(reverse)):
        pass
    assert [sample.tokens for sample in reversed(reverse)] == expected


def test_what_is_drawn_has_the_distribution_that_the_model_and_the_filters_give():
    """4,000 first and second tokens of one prompt, against probabilities of full passes, filtered by hand."""
    model = build(FAMILIES["llama"].model_copy(update={"vocab_size": 7}))
    samples = [Sample([1, 2, 3], sample_key(0, index), 2) for index in range(4000)]
    for _ in run(Batch(model, Sampling(1.5, top_k=5), 500, 8), iter(samples)):
        pass
    firsts = [sample.tokens[0] for sample in samples]
    most = max(set(firsts), key=firsts.count)
    seconds = [sample.tokens[1] for sample in samples if sample.tokens[0] == most]
    for prompt, found in (([1, 2, 3], firsts), ([1, 2, 3, most], seconds)):
        with torch.no_grad():
            weights = (model(torch.tensor([prompt]))[0, -1].double() / 1.5).exp()
        weights[weights.argsort()[:2]] = 0
        counts = torch.tensor(found).bincount(minlength=7)
        assert counts[weights == 0].sum() == 0
        kept = weights > 0
        expected = weights[kept] / weights.sum() * len(found)
        assert expected.min() > 5, "too few for the test"
        assert chisquare(counts[kept], expected).pvalue > 1e-3


def test_under_autocast_keys_and_values_fit_the_cache():
    model = build(FAMILIES["llama"])
    with torch.autocast("cpu", torch.bfloat16):
        samples = drawn(model, prompts_of(model.config), Sampling(0), rows=3, max_tokens=3)
    assert all(len(sample.tokens) == 3 for sample in samples)


def test_in_batches_of_one_shape_logits_have_the_same_bits_whatever_is_in_the_other_rows():
    """And so have the log-probabilities, as far as the columns that are looked at, in 64s, are the same."""
    model = build(FAMILIES["llama"])
    first, *others = prompts_of(model.config)
    seen = [
        drawn(model, [first, *beside], Sampling(), rows=4, max_tokens=20)[0].logprobs
        for beside in (others[:3], others[3:6], [])
    ]
    assert seen[0] == seen[1] == seen[2]


def test_finished_rows_are_refilled_at_once():
    model = build(FAMILIES["gpt2"])
    samples = [Sample([1], index, max_tokens) for index, max_tokens in enumerate([9, 2, 3, 1, 3])]
    steps = [[sample.key for sample in step] for step in run(Batch(model, Sampling(), 2, 40), iter(samples))]
    assert [set(step) for step in steps] == [{0, 1}] * 2 + [{0, 2}] * 3 + [{0, 3}] + [{0, 4}] * 3
    assert all(sample.ended for sample in samples)


def test_equal_prompts_are_read_once_and_those_of_like_lengths_together():
    model, read = build(FAMILIES["gpt2"]), []
    model.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    prompts = prompts_of(model.config, [5, 9, 6, 30])
    drawn(model, [*prompts, prompts[0], [3]], Sampling(), rows=6, max_tokens=1)
    assert read == [(3, 8), (1, 29), (6, 1)]


def windowed(config, reach):
    """attention_mask of a model whose positions see the last `reach` positions only."""

    def mask(seq_len, document_ids, device):
        return torch.ones(seq_len, seq_len, dtype=torch.bool).tril().triu(1 - reach)[None, None]

    return patch("megagpt.model.gpt.attention_mask", mask)


@pytest.mark.parametrize("family", ["llama", "sinusoidal"])
@torch.no_grad()
def test_beyond_the_context_each_token_sees_the_last_positions(family):
    model = build(FAMILIES[family])
    (prompt,) = prompts_of(model.config, [33])
    found = [token for (token,) in generate(model, prompt, Sampling(0), max_new_tokens=70, slide=True)]
    ids = torch.tensor([prompt])
    with windowed(model.config, reach=40):
        for _ in range(70):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert found == ids[0, 33:].tolist()


def test_learned_positions_do_not_slide():
    with pytest.raises(UsageError, match="has learned 40 positions and knows no others"):
        longest(FAMILIES["gpt2"], 3, 10, slide=True)


@pytest.mark.parametrize(("family", "rows"), [("sinusoidal", 1), ("llama", 3)])
@torch.no_grad()
def test_a_compiled_step_draws_what_the_plain_one_draws(family, rows):
    """Ragged prompts, rows refilled, two numbers of columns, positions beyond the cache; two batches in turns."""
    config = FAMILIES[family].model_copy(update={"num_layers": 1})
    model = build(config)
    samplings = [Sampling(temperature=0), Sampling(temperature=0.9, top_k=7, repetition_penalty=1.2)]
    prompts = prompts_of(config)
    expected = [drawn(model, prompts, sampling, rows=rows, max_tokens=70, max_len=80) for sampling in samplings]
    batches = [Batch(model, sampling, rows, 80, compile=True) for sampling in samplings]
    found = [[Sample(prompt, sample_key(0, i), 70) for i, prompt in enumerate(prompts)] for _ in samplings]
    runs = [run(batch, iter(samples)) for batch, samples in zip(batches, found, strict=True)]
    for _ in zip(*runs, strict=True):
        pass
    for with_compile, without in zip(found, expected, strict=True):
        assert [sample.tokens for sample in with_compile] == [sample.tokens for sample in without]
        for one, other in zip(with_compile, without, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@torch._dynamo.config.patch(recompile_limit=1)
@torch.no_grad()
def test_a_process_may_compile_any_number_of_batches():
    model = build(FAMILIES["gpt2"].model_copy(update={"num_layers": 1}))
    results = set()
    for rows in (1, 2, 3):  # of one size they would share what was compiled
        sample = Sample([1, 2], 0, 2)
        for _ in run(Batch(model, Sampling(temperature=0), rows, 8, compile=True), iter([sample])):
            pass
        results.add(tuple(sample.tokens))
    assert len(results) == 1


def test_compiling_is_worth_it_for_many_steps_only():
    def worth(samples, max_tokens, rows):
        return worth_compiling([Sample([1], index, max_tokens) for index in range(samples)], rows)

    assert not worth(1, 200, 1)
    assert not worth(100, 200, 16)
    assert worth(1000, 200, 16)
    assert worth(1, 100_000, 1)


def test_a_batch_and_its_cache_go_as_soon_as_nobody_holds_them():
    gc.disable()
    try:
        batch = Batch(build(FAMILIES["llama"]), Sampling(), 2, 40)
        seen = weakref.ref(batch)
        del batch
        assert seen() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_rows_that_a_caller_abandons_are_free_again():
    config = FAMILIES["gpt2"]
    batch = Batch(build(config), Sampling(temperature=0), 2, 40)
    half = run(batch, iter([Sample([1, 2], 0, 39), Sample([3], 1, 39)]))
    for _ in range(30):
        next(half)
    half.close()
    sample = Sample([5, 6, 7], 0, 38)
    for _ in run(batch, iter([sample])):
        pass
    (alone,) = drawn(build(config), [[5, 6, 7]], Sampling(temperature=0), rows=1, max_tokens=38)
    assert sample.tokens == alone.tokens


def test_without_a_compiler_nothing_is_worth_compiling(monkeypatch):
    monkeypatch.setattr("megagpt.inference.batch.missing_for_compile", lambda: "a C++ compiler")
    assert not worth_compiling([Sample([1], 0, 10**6)], 1)
