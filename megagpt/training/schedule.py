"""Learning rate as a pure function of the run's progress, so that nothing of it needs saving.

Progress is counted in steps or in tokens. Linear warm-up to the peak, then: cosine (Loshchilov & Hutter 2017, one
cycle), linear, constant, or wsd (warm-up, stable, decay: Hu et al. 2024, MiniCPM), down to peak x min_lr_ratio.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megagpt.config.schema import RunConfig, ScheduleConfig


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
    def of(cls, config: RunConfig) -> "Schedule":
        """The schedule that a run's configuration describes."""
        total = config.total_tokens if config.schedule.in_tokens else config.total_steps
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

        Compared are the rates at a thousand points, which all shapes here are smooth enough for.
        """
        if earlier.unit != self.unit:
            return f"the schedule counted {earlier.unit} and now counts {self.unit}"
        for number in range(1001):
            point = progress * number // 1001
            then, now = earlier.rate(point, point + 1), self.rate(point, point + 1)
            if point < progress and not math.isclose(then, now, rel_tol=1e-9):
                what = f"the learning rate of {self.unit.removesuffix('s')} {point}"
                return f"{self._reason(earlier)}: {what} was {then:.4g} and would be {now:.4g}"
        return None

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
