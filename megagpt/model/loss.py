"""Output head and cross-entropy in one, in chunks of tokens, so that the logits of a batch never exist at once.

For a chunk the logits are computed, then, in a pass over them, the loss and its gradient, which overwrites them;
two more matrix products turn that into the gradients of hidden states and weight, and the buffer serves the next chunk.
So there are three products in all, as many as with full logits, and nothing is recomputed in backward, which only
multiplies by the incoming gradient. Cost: the weight's gradient is held in fp32 from forward to backward.

Logits and products have the weight's dtype (under autocast: autocast's); softmax, loss and sums over chunks are fp32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Target of a position without loss; what torch's cross_entropy ignores too."""

# Logits in flight at most. A CPU wants few, near its caches; a GPU wants matrix products large enough to fill it.
_CHUNK_ELEMENTS = {"cpu": 2**26}
_CHUNK_ELEMENTS_ELSEWHERE = 2**28


class LossKernels(NamedTuple):
    """The element-wise passes of the loss, exchangeable for compiled ones."""

    softmax_: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    accumulate_: Callable[[Tensor, Tensor, int], object]
    transpose: Callable[[Tensor, Tensor, torch.dtype], Tensor]

    def compiled(self) -> "LossKernels":
        """The same passes, each fused into one kernel at first use."""
        return LossKernels(torch.compile(self.softmax_), torch.compile(self.accumulate_), torch.compile(self.transpose))


def softmax_(logits: Tensor, targets: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies of logits (tokens, vocab), and its gradients by the targets' logits: (tokens,), 0 if none.

    overwrite: turn the logits into their softmax, of tokens without a target into 0. All that is returned is fp32.
    """
    exact = logits.to(_at_least_fp32(logits.dtype))
    log_normalizer = torch.logsumexp(exact, dim=-1)
    valid = targets != IGNORE_INDEX
    target_logits = exact.gather(1, _columns(targets).unsqueeze(1)).squeeze(1)
    loss = torch.where(valid, log_normalizer - target_logits, 0.0).sum()
    log_normalizer = torch.where(valid, log_normalizer, torch.inf)
    if overwrite:
        logits.copy_(torch.exp(exact - log_normalizer.unsqueeze(1)))
    return loss, torch.where(valid, torch.exp(target_logits - log_normalizer) - 1, 0.0)


def accumulate_(total: Tensor, addend: Tensor, scale: int) -> None:
    """Add scale x addend to `total` (fp32) in place; compiled, `addend` (any float) is never copied to fp32."""
    total.add_(addend, alpha=scale)


def transpose(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x total, transposed, in `dtype`: contiguous as the weight is, for other layouts are added up slowly."""
    return (total.to(_at_least_fp32(total.dtype)) * factor).to(dtype).t().contiguous()


EAGER_KERNELS = LossKernels(softmax_, accumulate_, transpose)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    kernels: LossKernels = EAGER_KERNELS,
    vocab_size: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of softmax(hidden_states @ weight.T): an fp32 scalar (fp64 for fp64 inputs).

    hidden_states: (tokens, hidden); weight: (vocab, hidden); targets: (tokens,) int64, IGNORE_INDEX where none.
    vocab_size: rows of the weight that are tokens, if not all: the others pad the products only, have no probability
    and get a gradient of 0.
    """
    size = len(weight) if vocab_size is None else vocab_size
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden_states, weight, targets, kernels, size)
    return _forward(hidden_states, weight, targets, kernels, size)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, kernels: LossKernels, vocab_size: int
    ) -> Tensor:
        loss, *gradients = _forward(hidden_states, weight, targets, kernels, vocab_size, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.kernels, ctx.dtypes = kernels, (hidden_states.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight), (hidden_dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
        return (
            None if hidden is None else (hidden * grad_loss).to(hidden_dtype),
            None if weight is None else ctx.kernels.transpose(weight, grad_loss, weight_dtype),
            None,
            None,
            None,
        )


def _forward(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    kernels: LossKernels,
    vocab_size: int,
    hidden_gradient: bool = False,
    weight_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, where asked for, its gradients by hidden states and weight.

    The first is in the products' dtype; the second, a sum over chunks, in fp32, and transposed: (hidden, vocab).
    """
    device, (padded_size, hidden_size) = weight.device.type, weight.shape
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    chunk_tokens = min(chunk_tokens_of(padded_size, device), max(1, len(targets)))
    loss = weight.new_zeros((), dtype=_at_least_fp32(dtype))
    # Results are written into buffers made once: fresh memory for each chunk costs as much as half a matrix product.
    logits_buffer = weight.new_empty(chunk_tokens, padded_size)
    if hidden_gradient:
        grad_hidden = torch.empty_like(hidden_states)
    if weight_gradient:
        # In fp16 the sum over a chunk could overflow, before the loss scale has any say; a power of two is exact.
        scale = 64 if dtype == torch.float16 else 1
        # As (hidden, vocab), which CPUs multiply a fifth faster than its transpose.
        grad_weight = product = weight.new_empty(hidden_size, padded_size)
        if chunk_tokens != len(targets) or scale > 1:  # else the one product is the sum
            grad_weight = torch.zeros_like(product, dtype=loss.dtype)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = logits_buffer[: len(targets[chunk])]
        torch.mm(hidden_states[chunk], weight.t(), out=logits)
        loss += _cross_entropy_(logits, targets[chunk], kernels, vocab_size, hidden_gradient or weight_gradient)
        grad_logits = logits  # overwritten in place, if any gradient is wanted
        if hidden_gradient:
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
        if weight_gradient:
            torch.mm(
                (hidden_states[chunk] / scale if scale > 1 else hidden_states[chunk]).t(), grad_logits, out=product
            )
            if grad_weight is not product:
                kernels.accumulate_(grad_weight, product, scale)
    return loss, grad_hidden if hidden_gradient else None, grad_weight if weight_gradient else None


def _cross_entropy_(
    logits: Tensor, targets: Tensor, kernels: LossKernels, vocab_size: int, with_gradient: bool
) -> Tensor:
    """The sum for one chunk, whose logits with_gradient overwrites by its gradient."""
    loss, target_gradients = kernels.softmax_(logits[:, :vocab_size], targets, with_gradient)
    if with_gradient:
        # Apart from the fused pass, to which targets would cost a comparison an element or a copy of the logits.
        rows = torch.arange(len(targets), device=targets.device)
        logits[rows, _columns(targets)] = target_gradients.to(logits.dtype)
        logits[:, vocab_size:] = 0.0  # the gradient of what has no probability
    return loss


def _columns(targets: Tensor) -> Tensor:
    """Where each token's target stands among its logits; 0 if it has none."""
    return torch.where(targets != IGNORE_INDEX, targets, 0)


def chunk_tokens_of(vocab_size: int, device: str) -> int:
    """Tokens whose logits exist at once, on "cpu" or "cuda".

    The largest power of two within the limit: it divides most batches, and an odd last chunk would compile anew.
    """
    elements = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_ELSEWHERE)
    return 1 << (max(elements // vocab_size, 1).bit_length() - 1)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
