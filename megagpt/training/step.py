"""What a step or an evaluation found, and its times, on their way from the device to the host.

Neither numbers nor times are waited for before somebody reads them: copies are asynchronous, times are CUDA events.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class StepNumbers(NamedTuple):
    """What one optimizer step was."""

    loss: float
    """Mean over the targets of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping; inf where it is not finite."""
    skipped: bool
    """Whether loss or gradient were not finite, and the step changed nothing."""
    own_seconds: float
    """This rank's forward passes, which below ZeRO stage 3 wait for no other rank."""
    forward_backward_seconds: float
    """Forward and backward passes, gradient reduction included."""
    optimizer_seconds: float
    """Clipping, update, and gathering of the new weights."""


class EvaluationResult(NamedTuple):
    """What one evaluation found."""

    loss: float
    """Mean over all targets, nats."""
    targets: int
    """Their number."""
    bytes: int | None
    """Bytes of text that they stand for; None if that is not known."""


class StepResult:
    """A step's numbers on their way from the device: `read` waits for them, and for nothing queued later."""

    def __init__(self, numbers: torch.Tensor, clock: "StepClock") -> None:
        """numbers: loss, gradient norm and whether skipped, (3,) fp32 on the device."""
        self._clock, self._ready = clock, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._numbers = numbers

    def read(self) -> StepNumbers:
        """The numbers on the host."""
        if self._ready:
            self._ready.synchronize()
        loss, grad_norm, skipped = self._numbers.tolist()
        return StepNumbers(loss, grad_norm, bool(skipped), **self._clock.seconds())


class StepClock:
    """Times the parts of a step on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._forwards: list[tuple[Any, Any]] = []
        self._begin = self._now()
        self._backward_end = self._end = self._begin

    def forward(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Time one forward pass."""
        begin = self._now()
        result = run()
        self._forwards.append((begin, self._now()))
        return result

    def end_backward(self) -> None:
        """All backward passes are queued."""
        self._backward_end = self._now()

    def end(self) -> None:
        """The whole step is queued."""
        self._end = self._now()

    def seconds(self) -> dict[str, float]:
        """Seconds by the names of StepNumbers' fields; the step must be done."""
        return {
            "own_seconds": sum(self._between(begin, end) for begin, end in self._forwards),
            "forward_backward_seconds": self._between(self._begin, self._backward_end),
            "optimizer_seconds": self._between(self._backward_end, self._end),
        }

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if not self._on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000
