"""Losses of texts against transformers' own."""

import math

import numpy as np
import pytest
import torch

from megagpt.errors import UsageError
from megagpt.inference.score import score, score_text, window_sizes
from megagpt.tokenizer import load_tokenizer
from tests.unit.model.configs import FAMILIES, build, tokens
from tests.unit.model.test_parity import CASES

ONES = np.ones(101, np.int64)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_a_text_within_the_context_has_the_loss_of_transformers(family):
    config, convert = CASES[family]
    model = build(config)
    ids = tokens(config, batch=1, seq=30)
    found = score(model, ids[0].tolist(), ONES, context=40, stride=20)
    expected = convert(model)(ids, labels=ids).loss.item()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.text_bytes) == (29, 29)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(40, 20), (40, 40), (7, 1), (16, 5), (1, 1)])
@pytest.mark.parametrize("count", [2, 17, 41, 130])
@torch.no_grad()
def test_windows_predict_each_token_once_with_the_context_that_is_stated(context, stride, count):
    """One token after the other: its context is found by counting, its probability by transformers."""
    config, convert = CASES["llama"]
    model = build(config)
    hf = convert(model)
    ids = tokens(config, batch=1, seq=count)
    losses = []
    for target in range(1, count):
        windows_before = max(0, -(-(target - context) // stride))
        last = min(context + windows_before * stride, count - 1)
        begin = max(0, last - context)
        assert target - begin >= min(target, context - stride + 1)
        logits = hf(ids[:, begin:target]).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[0, target]].item())
    found = score(model, ids[0].tolist(), ONES, context=context, stride=stride)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_bytes_are_those_of_the_predicted_tokens():
    model = build(FAMILIES["gpt2"].model_copy(update={"vocab_size": 257}))
    found = score_text(model, load_tokenizer("bytes"), "añb", context=40, stride=40)
    assert (found.tokens, found.text_bytes) == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((41, None), "context must be 1 to 40 tokens for this model, but it is 41"),
        ((10, 11), "stride must be 1 to 10 tokens, the context, but it is 11"),
        ((None, 0), "stride must be 1 to 40"),
    ],
)
def test_windows_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        window_sizes(build(FAMILIES["gpt2"]), *arguments)


def test_one_token_alone_cannot_be_scored():
    with pytest.raises(UsageError, match="it takes 2"):
        score(build(FAMILIES["gpt2"]), [1], ONES, context=4, stride=2)
