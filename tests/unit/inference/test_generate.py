"""Continuations against a loop without cache that runs the whole sequence for every token."""

import pytest
import tiktoken
import torch

from megagpt.errors import UsageError, UserError
from megagpt.inference import Sampling, generate, generate_text
from megagpt.tokenizer import Tokenizer, load_tokenizer
from tests.unit.model.configs import FAMILIES, build, tokens


def collect(steps):
    """Tokens of each sample, without the None of ended ones."""
    return [[token for token in sample if token is not None] for sample in zip(*steps, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_continuation_is_that_of_repeated_full_passes(family):
    model = build(FAMILIES[family])
    ids = tokens(model.config, batch=1, seq=7)
    (found,) = collect(generate(model, ids[0].tolist(), Sampling(temperature=0), max_new_tokens=20))
    for _ in range(20):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert found == ids[0, 7:].tolist()


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"])


def test_a_sample_is_the_same_alone_and_in_a_batch(model):
    def sampled(num_samples, seed=3):
        steps = generate(
            model, [1, 2, 3], Sampling(1.0, top_p=0.9), num_samples=num_samples, max_new_tokens=30, seed=seed
        )
        return collect(steps)

    five = sampled(5)
    assert len({tuple(sample) for sample in five}) == 5
    assert sampled(1) == five[:1]
    assert sampled(3) == five[:3]
    assert sampled(1, seed=4) != five[:1]


def test_samples_end_before_the_stop_token_each_for_itself(model):
    options = {"num_samples": 4, "max_new_tokens": 30, "seed": 1}
    free = collect(generate(model, [1, 2], Sampling(), **options))
    stop = free[2][11]
    stopped = collect(generate(model, [1, 2], Sampling(), stop_id=stop, **options))
    for sample, cut in zip(free, stopped, strict=True):
        assert cut == (sample[: sample.index(stop)] if stop in sample else sample)
    assert any(stop not in sample for sample in free), "some sample goes on"


def test_generation_ends_where_all_samples_have_ended(model):
    (first, *_), *_ = generate(model, [5], Sampling(temperature=0), max_new_tokens=1)
    assert list(generate(model, [5], Sampling(temperature=0), max_new_tokens=9, num_samples=3, stop_id=first)) == []


def test_padding_ids_of_the_vocabulary_are_never_drawn(model):
    steps = generate(
        model, [1], Sampling(5.0), num_samples=30, max_new_tokens=39, allowed=torch.arange(model.config.vocab_size) < 10
    )
    assert {token for sample in collect(steps) for token in sample} == set(range(10))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    broken = build(FAMILIES["gpt2"])
    with torch.no_grad():
        broken.embedding.weight[3] = value
    with pytest.raises(UserError, match="logits are not finite"):
        list(generate(broken, [1], Sampling(temperature), max_new_tokens=3))


def test_holes_and_control_tokens_of_a_vocabulary_are_never_drawn():
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 300, "<|control|>": 301}
    encoding = tiktoken.Encoding("holes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    tokenizer = Tokenizer("holes", encoding, vocab_sha256="")
    model = build(FAMILIES["gpt2"].model_copy(update={"vocab_size": 310}))
    steps = generate_text(model, tokenizer, "a", Sampling(50.0), num_samples=200, max_new_tokens=20)
    text = "".join(piece for pieces in steps for piece in pieces)
    assert len(text) > 500
    assert "control" not in text


def test_the_context_is_used_to_its_last_position_and_not_beyond(model):
    prompt = tokens(model.config, batch=1, seq=40)[0].tolist()
    assert len(list(generate(model, prompt, Sampling(), max_new_tokens=99))) == 1
    assert len(list(generate(model, prompt[:30], Sampling(), max_new_tokens=99))) == 11


@pytest.mark.parametrize("length", [0, 41])
def test_prompts_that_do_not_fit_are_usage_errors(model, length):
    with pytest.raises(UsageError, match=f"the prompt has {length} tokens; this model reads 1 to 40"):
        next(generate(model, [1] * length, Sampling(), max_new_tokens=5))


class Script(torch.nn.Module):
    """Stands in for a GPT that says given bytes, then the end of the document."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self.config = FAMILIES["gpt2"].model_copy(update={"max_seq_len": 1000, "vocab_size": 257})
        self.embedding = torch.nn.Embedding(257, 1)
        self.script = iter([*said, 256])

    def forward(self, input_ids, cache=None, last_position_only=False):
        logits = torch.zeros(len(input_ids), 1, 257)
        logits[:, :, next(self.script)] = 1
        return logits


@pytest.mark.parametrize(
    "text", ["plain", "naïve – 世界 😀!", "\ud83d".encode("utf-8", "surrogatepass").decode("latin1")]
)
def test_text_streams_in_whole_characters(text):
    pieces = [
        piece
        for (piece,) in generate_text(
            Script(text.encode()), load_tokenizer("bytes"), "x", Sampling(temperature=0), max_new_tokens=99
        )
    ]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces), "every byte is a step: a character comes with its last one"
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_become_replacement_characters():
    said = b"a\xff\xe4\xb8"  # an impossible byte; two of the three bytes of a character, then the end
    steps = generate_text(
        Script(said), load_tokenizer("bytes"), "x", Sampling(temperature=0), max_new_tokens=99, num_samples=2
    )
    assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == ["a\ufffd\ufffd"] * 2


def test_an_empty_prompt_begins_a_document():
    tokenizer, seen = load_tokenizer("bytes"), []
    script = Script(b"ok")
    script.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    list(generate_text(script, tokenizer, "", Sampling(temperature=0), max_new_tokens=1))
    assert seen == [[[tokenizer.eod_id]]]
