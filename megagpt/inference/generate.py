"""Continue a prompt: tokens, or text, as they come. Many prompts: see megagpt.inference.batch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megagpt.inference.batch import Batch, Sample, longest, run, worth_compiling
from megagpt.inference.sampling import Sampling, sample_key
from megagpt.inference.text import TextSample
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    seed: int = 0,
    stop_id: int | None = None,
    allowed: Tensor | None = None,
    slide: bool = False,
    compile: bool | None = None,
    graphs: bool = True,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each sample; None for samples that have ended.

    A sample ends before `stop_id`, after `max_new_tokens` tokens, or where the model's context is full; with `slide` it
    goes on there, and each token sees the last max_seq_len. `allowed`: (vocab,) bool, the ids that may be drawn; None:
    all. Sample i depends on seed and i only. `model` should be in eval mode. `compile`: whether to compile the step;
    None: if it is worth it. `graphs`: see Batch.
    Raises UsageError for an empty prompt, one longer than the context, or learned positions that should slide;
    UserError if the logits are not finite.
    """
    max_tokens = longest(model.config, len(prompt_ids), max_new_tokens, slide)
    samples = [Sample(prompt_ids, sample_key(seed, index), max_tokens, stop_id) for index in range(num_samples)]
    batch = _batch(model, samples, sampling, allowed, compile, graphs)
    for step, _ in enumerate(run(batch, iter(samples))):
        if all(len(sample.tokens) <= step for sample in samples):
            return
        yield [sample.tokens[step] if len(sample.tokens) > step else None for sample in samples]


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    slide: bool = False,
    compile: bool | None = None,
) -> Iterator[list[str]]:
    """Yield, step by step, the next piece of text of each sample, up to its end-of-document token or a stop string.

    Pieces are whole characters: the bytes of an incomplete one wait for the next token, as does what may become a stop
    string. For the rest see `generate`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    max_tokens = longest(model.config, len(prompt_ids), max_new_tokens, slide)
    samples = [
        TextSample(prompt_ids, sample_key(seed, index), max_tokens, tokenizer, stop) for index in range(num_samples)
    ]
    shown = [0] * num_samples
    batch = _batch(model, samples, sampling, drawable(tokenizer, model), compile)
    for _ in run(batch, iter(samples)):
        yield [sample.text[start:] for sample, start in zip(samples, shown, strict=True)]
        shown = [len(sample.text) for sample in samples]


def _batch(
    model: GPT,
    samples: Sequence[Sample],
    sampling: Sampling,
    allowed: Tensor | None,
    compile: bool | None,
    graphs: bool = True,
) -> Batch:
    rows = len(samples)
    compile = worth_compiling(samples, rows) if compile is None else compile
    most = positions_needed(model, samples)
    return Batch(model, sampling, rows, most, allowed=allowed, compile=compile, graphs=graphs)


def positions_needed(model: GPT, samples: Sequence[Sample]) -> int:
    """The most positions that one of the samples sees at a time."""
    return min(model.config.max_seq_len, max(len(sample.prompt_ids) + sample.max_tokens - 1 for sample in samples))


def drawable(tokenizer: Tokenizer, model: GPT) -> Tensor:
    """(vocab,) bool: ordinary tokens and the end of a document, no padding, holes or control tokens."""
    ids = torch.tensor([*tokenizer.ranks.values(), tokenizer.eod_id])
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[ids[ids < len(allowed)]] = True
    return allowed.to(model.embedding.weight.device)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; for an empty prompt an end-of-document token, after which a new document begins."""
    return tokenizer.encode(prompt) or [tokenizer.eod_id]
