"""Continue a prompt: tokens, or text, as they come.

The prompt is read once; its keys and values are then copied for all samples, which are decoded together.
"""

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError, UserError
from megagpt.inference.cache import KVCache
from megagpt.inference.sampling import Sampling, draw, sample_generators, uniforms
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer


@torch.no_grad()
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
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each sample; None for samples that have ended.

    A sample ends before `stop_id`, after `max_new_tokens` tokens, or where the model's context is full. `allowed`:
    (vocab,) bool, the ids that may be drawn; None: all. `model` should be in eval mode.
    Raises UsageError for an empty prompt, or one longer than the context; UserError if the logits are not finite.
    """
    max_new_tokens = min(max_new_tokens, tokens_left(model.config, len(prompt_ids)))
    weight = model.embedding.weight
    cache = KVCache.empty(model.config, 1, len(prompt_ids) + max_new_tokens, weight.device, weight.dtype)
    input_ids = torch.tensor([prompt_ids], device=weight.device)
    logits = model(input_ids, cache=cache, last_position_only=True).expand(num_samples, -1, -1)
    cache = cache.repeated(num_samples)
    generators = sample_generators(seed, num_samples)
    running = [True] * num_samples
    for step in range(max_new_tokens):
        if step > 0:
            logits = model(input_ids, cache=cache, last_position_only=True)
        probabilities = sampling.probabilities(_checked(logits[:, -1], allowed))
        tokens = draw(probabilities, uniforms(generators).to(weight.device))
        running = [runs and token != stop_id for runs, token in zip(running, tokens.tolist(), strict=True)]
        if not any(running):
            return
        yield [token if runs else None for runs, token in zip(running, tokens.tolist(), strict=True)]
        input_ids = tokens.unsqueeze(1)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Yield, step by step, the next piece of text of each sample, up to its end-of-document token.

    Pieces are whole characters: the bytes of an incomplete one wait for the next token. For the rest see `generate`.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    for tokens in generate(
        model,
        encode_prompt(tokenizer, prompt),
        sampling,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_id=tokenizer.eod_id,
        allowed=_drawable(tokenizer, model),
    ):
        yield [
            "" if token is None else decoder.decode(tokenizer.decode_bytes([token]))
            for token, decoder in zip(tokens, decoders, strict=True)
        ]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def _checked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The logits (batch, vocab) of allowed ids, -inf elsewhere. Raises UserError if the largest is not finite."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise UserError(
            "the model's logits are not finite: its training diverged, or fp16 is too narrow for it; "
            "try an earlier checkpoint, or fp32"
        )
    return logits


def _drawable(tokenizer: Tokenizer, model: GPT) -> Tensor:
    """(vocab,) bool: ordinary tokens and the end of a document, no padding, holes or control tokens."""
    ids = torch.tensor([*tokenizer.ranks.values(), tokenizer.eod_id])
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[ids[ids < len(allowed)]] = True
    return allowed.to(model.embedding.weight.device)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; for an empty prompt an end-of-document token, after which a new document begins."""
    return tokenizer.encode(prompt) or [tokenizer.eod_id]


def tokens_left(config: ModelConfig, prompt_tokens: int) -> int:
    """How many tokens the model can add to a prompt: the last one is never read. Raises UsageError if there is none."""
    context = config.max_seq_len
    if not 0 < prompt_tokens <= context:
        raise UsageError(f"the prompt has {prompt_tokens} tokens; this model reads 1 to {context}: change the prompt")
    return context - prompt_tokens + 1
