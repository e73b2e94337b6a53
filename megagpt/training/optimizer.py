"""AdamW (Loshchilov & Hutter 2019); or Muon (Jordan 2024, kellerjordan.github.io/posts/muon) with AdamW beside it.

Muon steps along the momentum of a matrix's gradient with all singular values brought near 1, here scaled to the size
of AdamW's steps (Liu et al. 2025, arXiv 2502.16982), so that learning rate and weight decay serve both. Its state is
half of AdamW's; its products cost a step as much as 4 to 5 x hidden_size more tokens. It needs whole matrices: with
ZeRO 1 and 2, where each rank owns one range of all of them laid end to end, a matrix across a border is put together by
the ranks that share it, and each rank works on its own ones only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.config.schema import OptimizerConfig

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic, steepest at 0
_ITERATIONS = 5
_UPDATE_RMS = 0.2  # of AdamW's steps, by Liu et al.
_MATRICES = "matrices"
"""Key of Muon's groups: for each parameter, the (rows, columns) of the matrices stacked in it."""


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    kind_of: Callable[[str], str],
    heights_of: Callable[[str], Sequence[int] | None] = lambda name: None,
    scale_of: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """The model's parameters in groups: with and without weight decay, by scale, and Muon's if config.name is muon.

    kind_of(name): norm, bias, embedding, head or matrix; Muon takes the matrices. heights_of(name): rows of each of
    the matrices stacked in a parameter, which Muon takes one by one; None if it is one matrix. scale_of(name): its
    learning rate over the run's. It does not scale the decay: that is lr x weight_decay a step for all.
    Groups with no parameters are left out. A shared (tied) parameter appears once, under its first name.
    """
    others: dict[tuple[bool, float], list[nn.Parameter]] = {}
    hidden: list[nn.Parameter] = []
    matrices: list[list[tuple[int, int]]] = []
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        if kind == "matrix" and config.name == "muon":
            rows, columns = parameter.shape
            hidden.append(parameter)
            matrices.append([(height, columns) for height in heights_of(name) or [rows]])
        else:
            others.setdefault((kind not in config.no_decay, scale_of(name)), []).append(parameter)
    groups: list[dict[str, Any]] = []
    if hidden:
        groups.append({"params": hidden, _MATRICES: matrices, "decayed": True, "lr_scale": 1.0})
    for (decayed, scale), parameters in sorted(others.items(), key=lambda item: item[0], reverse=True):
        groups.append({"params": parameters, "decayed": decayed, "lr_scale": scale})
    apply_settings(groups, config)
    return groups


def apply_settings(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
    """Set in optimizer groups, new or from a checkpoint, all that `config` says but the learning rate."""
    for group in groups:
        group.setdefault("lr_scale", 1.0)  # older checkpoints have none
        group["weight_decay"] = config.weight_decay / group["lr_scale"] if group["decayed"] else 0.0
        if _MATRICES in group:
            group["momentum"] = config.muon_momentum
        else:
            group["betas"], group["eps"] = config.betas, config.eps


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, precision: str) -> torch.optim.Optimizer:
    """The optimizer of `parameter_groups`, on CPU and GPU; DeepSpeed gives it the flat fp32 partitions it owns instead.

    precision: the run's; with bf16 Muon's matrix products are bf16, as Jordan's, else fp32.
    Where the optimizer's `found_inf`, an fp32 scalar on the parameters' device, holds 1, a step changes neither weights
    nor state, without anybody waiting for its value.
    """
    if config.name == "muon":
        return MuonWithAdamW(groups, config.lr, torch.bfloat16 if precision == "bf16" else torch.float32)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that list their matrices, torch's fused AdamW for the others."""

    found_inf: Tensor | None = None
    """See build_optimizer."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, muon_dtype: torch.dtype) -> None:
        self._muon_dtype = muon_dtype
        self._adamw = torch.optim.AdamW([group for group in groups if _MATRICES not in group], lr=lr, fused=True)
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. With ZeRO 1 or 2 all ranks call it."""
        for group in self.param_groups:  # DeepSpeed puts one group at a time here
            if _MATRICES in group:
                self._step_matrices(group)
        self._adamw.param_groups = [group for group in self.param_groups if _MATRICES not in group]
        self._adamw.state, self._adamw.found_inf = self.state, self.found_inf  # type: ignore[attr-defined]
        if self._adamw.param_groups:
            self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params, matrices, rank = group["params"], group[_MATRICES], 0
        if params[0].ndim == 1:  # ZeRO's: this rank's range of all matrices
            matrices, rank = [[shape for stacked in matrices for shape in stacked]], dist.get_rank()
        for parameter, shapes in zip(params, matrices, strict=True):
            if parameter.grad is None:
                continue
            state, grad = self.state[parameter], parameter.grad
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            applied: Tensor | float = 1.0
            if self.found_inf is not None:
                # Numbers, and all of them factors 0: infinity times 0 would be none.
                applied = 1.0 - self.found_inf
                grad.masked_fill_(self.found_inf > 0, 0.0)
            momentum = state["momentum_buffer"]
            momentum.lerp_(grad, (1 - group["momentum"]) * applied)
            update = grad.lerp(momentum, group["momentum"]).contiguous()  # Nesterov's
            _orthogonalize_parts_(update.view(-1), shapes, rank, self._muon_dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"] * applied)
            parameter.sub_(update.mul_(group["lr"] * applied))


def orthogonalized(matrix: Tensor) -> Tensor:
    """U S V^T -> U S' V^T with S' between about 0.7 and 1.2, by Newton-Schulz iteration in the matrix's dtype."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x


def _orthogonalize_parts_(part: Tensor, shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype) -> None:
    """Replace matrices in a part of a flat row of them by what Muon steps along.

    part: elements [rank x length, (rank + 1) x length) of the matrices of `shapes` end to end and zeros after them.
    The ranks hold parts of equal length, and those that share a matrix exchange it; the others take no part in that.
    """
    length = len(part)
    begin, end, offset = rank * length, (rank + 1) * length, 0
    wholes: list[tuple[Tensor, Tensor, slice]] = []  # where it goes to, the matrix, which of its elements
    exchanges: list[dist.P2POp] = []
    for rows, columns in shapes:
        first, last, size = max(offset, begin), min(offset + rows * columns, end), rows * columns
        if first < last:
            own = part[first - begin : last - begin]
            whole = own.to(dtype)
            if last - first < size:
                whole = part.new_empty(size, dtype=dtype)
                whole[first - offset : last - offset] = own
                exchanges += _exchanges(whole, offset, length, rank)
            wholes.append((own, whole.view(rows, columns), slice(first - offset, last - offset)))
        offset += size
    assert offset <= length * (dist.get_world_size() if dist.is_initialized() else 1), "not the matrices of this part"
    for request in dist.batch_isend_irecv(exchanges) if exchanges else []:
        request.wait()
    for own, whole, elements in wholes:
        scale = _UPDATE_RMS * math.sqrt(max(whole.shape))
        own.copy_(orthogonalized(whole).reshape(-1)[elements]).mul_(scale)


def _exchanges(whole: Tensor, offset: int, length: int, rank: int) -> list[dist.P2POp]:
    """What completes a flat matrix, at `offset` in the row of all, of which each rank in its range has its elements."""
    first_rank, last_rank = offset // length, (offset + len(whole) - 1) // length

    def elements(of_rank: int) -> Tensor:
        return whole[max(0, of_rank * length - offset) : (of_rank + 1) * length - offset]

    operations = []
    for other in range(first_rank, last_rank + 1):
        if other != rank:
            operations.append(dist.P2POp(dist.isend, elements(rank), other))
            operations.append(dist.P2POp(dist.irecv, elements(other), other))
    return operations
