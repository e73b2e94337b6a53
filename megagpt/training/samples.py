"""What the model writes at each evaluation, for people to read."""

from collections.abc import Sequence

import torch

from megagpt.inference.generate import encode_prompt, generate
from megagpt.inference.sampling import Sampling
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer


def continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """One continuation of each prompt, up to an end of document, drawn at temperature 1.

    Every rank calls it and does as many forward passes as the others, which ZeRO stage 3 needs: so each continuation
    is drawn to its full length, then cut. The same seed draws the same numbers at every evaluation.
    """
    model.eval()
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[[*tokenizer.ranks.values(), tokenizer.eod_id]] = True
    texts = []
    # One position at a time, with a growing cache: shapes that the compiled blocks were not made for.
    with torch.compiler.set_stance("force_eager"):
        for number, prompt in enumerate(prompts):
            steps = generate(
                model,
                encode_prompt(tokenizer, prompt),
                Sampling(),
                max_new_tokens=max_new_tokens,
                seed=seed + number,
                allowed=allowed.to(model.embedding.weight.device),
                compile=False,
                graphs=False,
            )
            tokens = [token for (token,) in steps if token is not None]
            if tokenizer.eod_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eod_id)]
            texts.append(tokenizer.decode(tokens))
    return texts
