"""Learning rate as a pure function of the run's progress, so that nothing of it needs saving.

Progress is counted in steps or in tokens. Linear warm-up to the peak, then: cosine (Loshchilov & Hutter 2017, one
cycle), linear, constant, or wsd (warm-up, stable, decay: Hu et al. 2024, MiniCPM), down to peak x min_lr_ratio.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megagpt.config.schema import RunConfig, ScheduleConfig
from megagpt.training.horizon import Horizon


class Schedule(BaseModel):
    """The learning rates of a whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["cosine", "linear", "constant", "wsd"]
    unit: Literal["steps", "tokens"]
    """What warmup, decay and total count."""
    peak: float
    min_ratio: float
    warmup: int
    decay: int | None
    total: int

    @classmethod
    def of(cls, config: RunConfig, length: Horizon) -> "Schedule":
        """The schedule that a configuration describes for a run of this length."""
        total = length.tokens if config.schedule.in_tokens else length.steps
        return cls.build(config.schedule, config.optimizer.lr, total)

    @classmethod
    def build(cls, schedule: ScheduleConfig, peak: float, total: int) -> "Schedule":
        """`schedule` with this peak, for a run of `total` steps, or tokens if it counts tokens."""
        in_tokens = schedule.in_tokens
        return cls(
            shape=schedule.name,
            unit="tokens" if in_tokens else "steps",
            peak=peak,
            min_ratio=schedule.min_lr_ratio,
            warmup=(schedule.warmup_tokens or 0) if in_tokens else schedule.warmup_steps,
            decay=schedule.decay_tokens if in_tokens else schedule.decay_steps,
            total=total,
        )

    def rate(self, before: int, after: int) -> float:
        """Learning rate of the step that leads from `before` to `after` steps or tokens."""
        if before < self.warmup:
            return self.peak * min(1.0, after / self.warmup)
        if self.shape == "constant":
            return self.peak
        floor = self.peak * self.min_ratio
        start, length = self.fall
        progress = min(max(before - start, 0) / length, 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return floor + (self.peak - floor) * remaining

    def difference(self, earlier: "Schedule", progress: int) -> str | None:
        """Why training up to `progress` steps or tokens under `earlier` differs from this schedule; None: it does not.

        Compared are the rates at a thousand points and where a fall may begin or have come to; in between all shapes
        here are smooth.
        """
        if earlier.unit != self.unit:
            return f"the schedule counted {earlier.unit} and now counts {self.unit}"
        points = {progress * number // 1000 for number in range(1000)} | {progress - 1, earlier.fall[0], self.fall[0]}
        for point in sorted(points):
            then, now = earlier.rate(point, point + 1), self.rate(point, point + 1)
            if 0 <= point < progress and not math.isclose(then, now, rel_tol=1e-9):
                what = f"the learning rate of {self.unit.removesuffix('s')} {point}"
                return f"{self._reason(earlier)}: {what} was {then:.4g} and would be {now:.4g}"
        return None

    def kept_by(self, earlier: "Schedule") -> int | None:
        """The length of the fall that gives a longer run the rates of `earlier`; None if other things changed too."""
        only_longer = earlier.model_copy(update={"total": self.total}) == self
        return earlier.fall[1] if only_longer and self.shape in ("cosine", "linear") else None

    def _reason(self, earlier: "Schedule") -> str:
        """What the user changed."""
        named = {"peak": "optimizer.lr", "shape": "schedule.name", "min_ratio": "schedule.min_lr_ratio"}
        named |= {"warmup": f"schedule.warmup_{self.unit}", "decay": f"schedule.decay_{self.unit}"}
        named |= {"total": f"the length of the run in {self.unit}"}
        changed = [
            f"{words} was {getattr(earlier, key)} and is now {getattr(self, key)}"
            for key, words in named.items()
            if getattr(earlier, key) != getattr(self, key)
        ]
        return ", ".join(changed)

    @property
    def fall(self) -> tuple[int, int]:
        """Where the fall begins, and its length, in steps or tokens."""
        if self.shape == "wsd":
            length = self.decay or max(1, self.total // 10)
            return max(self.total - length, self.warmup), length
        return self.warmup, self.decay or max(1, self.total - self.warmup)
