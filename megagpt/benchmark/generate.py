"""How fast a model samples, side by side with transformers and nanoGPT: the same random weights, prompts and length.

Timed are whole calls with prompts of equal lengths, without loading and compiling. A step must read all weights that it
multiplies by, so bytes of weights x steps a second over the measured bandwidth of memory is the share of the possible
that is reached at batch 1, and about that at small batches.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.benchmark.peers import check_peers, nanogpt_model, transformers_model, weights_of
from megagpt.benchmark.turns import ratio, read_bandwidth, take_turns
from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError
from megagpt.inference.batch import Batch, Sample, run
from megagpt.inference.sampling import Sampling, sample_key
from megagpt.model import GPT
from megagpt.model.init import initialize_weights


@dataclass(frozen=True)
class GenerateBenchmark:
    """What is measured for each model and number of rows."""

    prompt_tokens: int
    new_tokens: int
    sampling: Sampling
    """Temperature and top_k only, which all contenders have."""
    repeats: int
    dtype: torch.dtype
    device: torch.device
    transformers: bool
    """Whether to compare with it."""
    nanogpt: Path | None
    """Its model.py, to compare with it; it runs in fp32 without a cache, as its sampler does on a CPU."""
    report: Callable[[str], None]
    """Is given a line about each result."""

    def run(self, models: dict[str, ModelConfig], rows: list[int]) -> dict[str, Any]:
        """Results by model and number of rows; JSON types.

        Raises UsageError, before anything is measured, for a model that a contender cannot express.
        """
        for name, config in models.items():
            self._check(name, config)
        bandwidth = read_bandwidth(self.device)
        self.report(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
        results = [self._measure(name, config, size, bandwidth) for name, config in models.items() for size in rows]
        return {
            "read_bytes_per_second": bandwidth,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "dtype": str(self.dtype).removeprefix("torch."),
            "results": results,
        }

    def _check(self, name: str, config: ModelConfig) -> None:
        if self.prompt_tokens + self.new_tokens > config.max_seq_len + 1:
            raise UsageError(
                f"{name}: reads {config.max_seq_len} tokens, fewer than --prompt-tokens and --new-tokens together"
            )
        check_peers(config, self.transformers, self.nanogpt)

    def _measure(self, name: str, config: ModelConfig, rows: int, bandwidth: float) -> dict[str, Any]:
        config = config.without_padding()
        model = GPT(config)
        initialize_weights(model, 0)
        weights = weights_of(model)
        model = model.to(self.device, self.dtype).eval()
        prompts = torch.randint(
            config.vocab_size, (rows, self.prompt_tokens), generator=torch.Generator().manual_seed(0)
        )
        contenders: dict[str, Callable[[], object]] = {
            "megagpt": self._ours(model, prompts, compile=True),
            "uncompiled": self._ours(model, prompts, compile=False),
        }
        if self.transformers:
            contenders["transformers"] = self._transformers(transformers_model(config, weights, self.dtype), prompts)
        if self.nanogpt:
            contenders["nanogpt"] = self._nanogpt(nanogpt_model(self.nanogpt, config, weights), prompts)
        started = time.perf_counter()
        contenders["megagpt"]()
        compile_seconds = time.perf_counter() - started
        take_turns(contenders, 1)
        seconds = take_turns(contenders, self.repeats)
        tokens = rows * self.new_tokens
        rates = {who: tokens / statistics.median(times) for who, times in seconds.items()}
        share = _bytes_read(model) * rates["megagpt"] / rows / bandwidth
        times = {who: ratio(theirs, seconds["megagpt"]) for who, theirs in seconds.items() if who != "megagpt"}
        self.report(
            f"{name}, batch {rows}: "
            + ", ".join(f"{who} {rate:,.0f}" for who, rate in rates.items())
            + " new tokens/s; megagpt is "
            + ", ".join(f"{value['median']:.2f} x {who}" for who, value in times.items())
            + f"; {share:.0%} of memory's speed; first call {compile_seconds:.0f} s"
        )
        return {
            "model": name,
            "rows": rows,
            "tokens_per_second": rates,
            "speedup_over": times,
            "share_of_bandwidth": share,
            "first_call_seconds": compile_seconds,
        }

    def _ours(self, model: GPT, prompts: Tensor, compile: bool) -> Callable[[], object]:
        batch = Batch(model, self.sampling, len(prompts), self.prompt_tokens + self.new_tokens - 1, compile=compile)

        def draw() -> None:
            samples = [Sample(ids, sample_key(0, row), self.new_tokens) for row, ids in enumerate(prompts.tolist())]
            for _ in run(batch, iter(samples)):
                pass

        return draw

    def _transformers(self, theirs: Any, prompts: Tensor) -> Callable[[], object]:
        theirs = theirs.to(self.device).eval()
        ids = prompts.to(self.device)
        options: dict[str, Any] = {"do_sample": False}
        if self.sampling.temperature:
            top_k = self.sampling.top_k or theirs.config.vocab_size
            options = {"do_sample": True, "temperature": self.sampling.temperature, "top_k": top_k}
        options |= {"min_new_tokens": self.new_tokens, "max_new_tokens": self.new_tokens, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return lambda: theirs.generate(ids, attention_mask=mask, **options).tolist()

    def _nanogpt(self, theirs: Any, prompts: Tensor) -> Callable[[], object]:
        theirs = theirs.to(self.device).eval()
        greedy = self.sampling.temperature == 0
        temperature, top_k = (1.0, 1) if greedy else (self.sampling.temperature, self.sampling.top_k)
        ids = prompts.to(self.device)
        return lambda: theirs.generate(ids, self.new_tokens, temperature=temperature, top_k=top_k).tolist()


def _bytes_read(model: GPT) -> int:
    """Of weights in a step: all but the tables of which a row is looked up."""
    looked_up = () if model.config.tie_embeddings else ("embedding.weight",)
    skipped = ("position_embedding.weight", *looked_up)
    return sum(value.nbytes for name, value in model.named_parameters() if name not in skipped)
