"""A fixed number of rows that are decoded together, each at its own position; a finished row takes the next sample.

A step is a function of fixed shapes: it reads one token a row, (batch, 1), at the rows' positions, changes its state in
place and waits for the device once, to fetch the drawn tokens. So it can be compiled, and on GPUs it is replayed as a
CUDA graph. The prompts are read before, all but their last token,
which is the first step's: prompts of like lengths in one pass, padded on the right, and equal prompts once. Positions
count from the prompt's own beginning, so that no padding is ever seen.
"""

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError, UserError
from megagpt.inference.cache import KVCache
from megagpt.inference.decoder import INDUCTOR_OPTIONS, decoder_of
from megagpt.inference.sampling import Sampling, choose
from megagpt.model import GPT
from megagpt.model.compiling import missing_for_compile

_COLUMNS = 64
"""The step looks at a multiple of so many columns of the cache."""
_STEPS_TO_COMPILE_FOR = 3_000
"""Steps whose time is about that of compiling: 20 s."""
_PREFILL_TOKENS = 16_384
"""Most tokens of one pass over several prompts, padding included."""


class Sample:
    """One continuation of one prompt: what is drawn so far, and whether it has ended."""

    def __init__(self, prompt_ids: Sequence[int], key: int, max_tokens: int, stop_id: int | None = None) -> None:
        """key: see sample_key; a sample depends on it, the prompt and the Sampling alone. It ends before stop_id."""
        self.prompt_ids, self.key, self.max_tokens, self.stop_id = prompt_ids, key, max_tokens, stop_id
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        """Natural logarithms of the model's own probabilities, before penalties, temperature and filters."""
        self.ended: str | None = None
        """None while it goes on; `end`: the model drew stop_id; `length`: max_tokens."""

    def take(self, token: int, logprob: float) -> None:
        """Add what was drawn."""
        if token == self.stop_id:
            self.ended = "end"
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if len(self.tokens) == self.max_tokens:
            self.ended = "length"


class Drawn(NamedTuple):
    """A step's result, one element a row; those of rows without a sample mean nothing."""

    tokens: list[int]
    logprobs: list[float]


class Batch:
    """`size` rows of one model, sampled in one way."""

    def __init__(
        self,
        model: GPT,
        sampling: Sampling,
        size: int,
        max_len: int,
        *,
        allowed: Tensor | None = None,
        compile: bool = False,
        graphs: bool = True,
    ) -> None:
        """max_len: the most positions that a row can see. allowed: (vocab,) bool, the ids that may be drawn.

        compile: the step, at its first use, see worth_compiling; the weights must then stay as they are, and on a CPU,
        in bf16 with size > 1, there is a copy of them. graphs: replay the step as a CUDA graph, if on a GPU; not for
        models whose forward pass waits for the GPU, as under ZeRO 3.
        """
        weight, vocab_size = model.embedding.weight, model.config.vocab_size
        self.model, self.sampling, self.size, self._allowed = model, sampling, size, allowed
        self._cache = KVCache.empty(model.config, size, max_len, weight.device, weight.dtype)
        self._device = weight.device
        # Per row: the next token to read and its position; 1 if there is a sample; its key and tokens drawn so far.
        self._input_ids = torch.zeros(size, 1, dtype=torch.int64, device=self._device)
        self._positions, self._running = torch.zeros_like(self._input_ids), torch.zeros_like(self._input_ids)
        self._keys, self._steps = (torch.zeros(size, dtype=torch.int64, device=self._device) for _ in range(2))
        self._in_text = self._counts = None
        if sampling.repetition_penalty != 1:
            self._in_text = torch.zeros(size, vocab_size, dtype=torch.bool, device=self._device)
        if sampling.frequency_penalty != 0:
            self._counts = torch.zeros(size, vocab_size, dtype=torch.int32, device=self._device)
        self._lengths = [0] * size  # the positions again, known without asking the device; 0: no sample
        # Made once: compiled, a range would be hashed as a loop's counter, whose overflow C++ leaves undefined.
        self._vocabulary = torch.arange(vocab_size, device=self._device)
        self._decoder = decoder_of(model, size, max_len) if compile else model
        # Called with this batch, so as not to refer to it: a cycle would keep the cache until garbage is collected.
        run: _Step = _Compiled() if compile else Batch._step
        self._run = _Graphs(run, self._device) if graphs and self._device.type == "cuda" else run

    @property
    def max_len(self) -> int:
        """The most positions that a row can see."""
        return self._cache.max_len

    @torch.no_grad()
    def start(self, samples: dict[int, Sample]) -> None:
        """Give these rows, which must be free, new samples, and read their prompts."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for row, sample in samples.items():
            by_prompt.setdefault(tuple(sample.prompt_ids), []).append(row)
        for group in _length_groups([prompt for prompt in by_prompt if len(prompt) > 1]):
            ids = torch.zeros(len(group), len(group[-1]) - 1, dtype=torch.int64)
            for index, prompt in enumerate(group):
                ids[index, : len(prompt) - 1] = torch.tensor(prompt[:-1])
            pairs = [(row, index) for index, prompt in enumerate(group) for row in by_prompt[prompt]]
            rows, prompts = self._tensor(pairs).unbind(1)
            view = self._cache.prefill(rows, prompts, ids.shape[1])
            self.model(ids.to(self._device), cache=view, last_position_only=True)
        rows = self._tensor(list(samples))
        values = [[s.prompt_ids[-1], len(s.prompt_ids) - 1, 1, s.key, 0] for s in samples.values()]
        ids, positions, running, keys, steps = self._tensor(values).unbind(1)
        self._input_ids[rows, 0], self._positions[rows, 0], self._running[rows, 0] = ids, positions, running
        self._keys[rows], self._steps[rows] = keys, steps
        for row, sample in samples.items():
            self._lengths[row] = len(sample.prompt_ids)
            if self._in_text is not None:
                self._in_text[row] = False
                self._in_text[row, self._tensor(sample.prompt_ids)] = True
        if self._counts is not None:
            self._counts[rows] = 0

    def stop(self, rows: Sequence[int]) -> None:
        """Free rows: their results mean nothing until they are started anew."""
        indices = self._tensor(rows)
        self._running[indices], self._positions[indices] = 0, 0
        for row in rows:
            self._lengths[row] = 0

    @torch.no_grad()
    def step(self) -> Drawn:
        """The next token of each row. Raises UserError where the model's logits are not finite."""
        furthest = -(-max(self._lengths) // _COLUMNS) * _COLUMNS
        columns = self._cache.columns(min(furthest, self._cache.max_len))
        # One transfer, of fp64, which holds every id.
        tokens, logprobs = self._run(self, columns).tolist()
        if any(token < 0 and length for token, length in zip(tokens, self._lengths, strict=True)):
            raise UserError(
                "the model's logits are not finite: its training diverged, or fp16 is too narrow for it; "
                "try an earlier checkpoint, or fp32"
            )
        self._lengths = [length and length + 1 for length in self._lengths]
        return Drawn([int(token) for token in tokens], logprobs)

    def _step(self, columns: Tensor) -> Tensor:
        """(2, size) fp64: tokens, -1 where logits are not finite, and their log-probabilities."""
        view = self._cache.at(self._positions, columns)
        logits = self._decoder(self._input_ids, cache=view, last_position_only=True)[:, -1].float()
        changed = self.sampling.penalized(logits, self._in_text, self._counts)
        if self._allowed is not None:
            changed = changed.masked_fill(~self._allowed, -torch.inf)
        tokens = choose(self.sampling, changed, self._keys, self._steps, self._vocabulary)[:, None]
        logprobs = logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)
        if self._in_text is not None:
            self._in_text.scatter_(1, tokens, True)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))
        self._input_ids.copy_(tokens)
        self._positions += self._running
        self._steps += 1
        finite = torch.isfinite(changed.amax(dim=-1, keepdim=True))
        return torch.cat((torch.where(finite, tokens, -1).double(), logprobs.double()), dim=1).T

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


_Step = Callable[[Batch, Tensor], Tensor]
"""Batch._step, or what stands for it."""


class _Compiled:
    """A step, compiled once for any number of columns."""

    def __init__(self) -> None:
        # With a code object of its own, as torch keeps what it compiled by code object, and eight versions at most.
        function = FunctionType(Batch._step.__code__.replace(), Batch._step.__globals__)
        self._step = torch.compile(function, fullgraph=True, options=INDUCTOR_OPTIONS)
        self._seen: set[int] = set()

    def __call__(self, batch: Batch, columns: Tensor) -> Tensor:
        if len(columns) in self._seen:
            # All else is the same tensors as before; to check hundreds of them takes longer than a layer.
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return self._step(batch, columns)
        torch._dynamo.maybe_mark_dynamic(columns, 0)
        self._seen.add(len(columns))
        return self._step(batch, columns)


class _Graphs:
    """A step as CUDA graphs, one for each number of columns: the first time it runs, the second it is recorded."""

    def __init__(self, step: _Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[int] = set()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, batch: Batch, columns: Tensor) -> Tensor:
        size = len(columns)
        if size not in self._seen:
            self._seen.add(size)
            return self._step(batch, columns)
        if size not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # On a stream of this device: that of the current one would record nothing of what another does.
            with torch.cuda.device(self._device):
                stream = torch.cuda.Stream(self._device)
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    result = self._step(batch, columns)
            self._graphs[size] = graph, result
        graph, result = self._graphs[size]
        graph.replay()
        return result


def worth_compiling(samples: Sequence[Sample], rows: int) -> bool:
    """Whether drawing all `samples`, as many as `rows` at a time, likely takes longer than to compile first.

    False where nothing can be compiled.
    """
    steps = sum(sample.max_tokens for sample in samples) / rows
    return steps > _STEPS_TO_COMPILE_FOR and missing_for_compile() is None


def run(batch: Batch, samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Draw `samples` to their ends, as many at a time as `batch` has rows; yield, after each step, those in it."""
    rows: dict[int, Sample] = {}
    try:
        while True:
            free = (row for row in range(batch.size) if row not in rows)
            new = dict(zip(free, samples, strict=False))
            if new:
                batch.start(new)
                rows |= new
            if not rows:
                return
            drawn = batch.step()
            for row, sample in rows.items():
                sample.take(drawn.tokens[row], drawn.logprobs[row])
            yield list(rows.values())
            ended = [row for row, sample in rows.items() if sample.ended]
            if ended:
                batch.stop(ended)
            for row in ended:
                del rows[row]
    finally:
        if rows:  # whoever asked has gone
            batch.stop(list(rows))


def tokens_left(config: ModelConfig, prompt_tokens: int) -> int:
    """How many tokens the model can add to a prompt: the last one is never read. Raises UsageError if there is none."""
    context = config.max_seq_len
    if not 0 < prompt_tokens <= context:
        raise UsageError(f"the prompt has {prompt_tokens} tokens; this model reads 1 to {context}: change the prompt")
    return context - prompt_tokens + 1


def longest(config: ModelConfig, prompt_tokens: int, max_tokens: int, slide: bool) -> int:
    """The most tokens to draw after a prompt: `max_tokens`, but not more than fit the context, unless `slide`.

    Raises UsageError for a prompt that does not fit, and for positions that cannot slide.
    """
    left = tokens_left(config, prompt_tokens)
    if slide and config.position == "learned":
        raise UsageError(
            f"sliding: this model has learned {config.max_seq_len} positions and knows no others; only models with "
            "rope or sinusoidal positions go on beyond their context"
        )
    return max_tokens if slide else min(max_tokens, left)


def _length_groups(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Groups to read in one pass, shortest prompt first: the longest is at most twice the shortest."""
    group: list[tuple[int, ...]] = []
    for prompt in sorted(prompts, key=len):
        if group and (len(prompt) > 2 * len(group[0]) or len(prompt) * (len(group) + 1) > _PREFILL_TOKENS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
