"""Learning rate schedule, and its unit: steps, or a fraction of the run."""

from __future__ import annotations

import math

from finesight.config import StepsOrFraction, TrainSettings
from finesight.errors import UserError


def resolve_steps(value: StepsOrFraction, total_steps: int) -> int:
    """Convert a number of steps or a fraction of the run to steps, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * total_steps)


class LRSchedule:
    """Learning rate schedule: linear warmup, then cosine, linear or no decay.

    The factor is positive in every step, including the first and the last one.

    Raises:
        UserError: The warmup is not shorter than the run.
    """

    def __init__(self, train: TrainSettings, total_steps: int) -> None:
        self.kind, self.total_steps = train.lr_schedule, total_steps
        self.warmup_steps = resolve_steps(train.warmup, total_steps)
        if self.warmup_steps >= total_steps and self.warmup_steps > 1:
            raise UserError(
                f"{self.warmup_steps} warmup steps in a run of {total_steps} steps",
                where="train.warmup",
                expected=f"fewer than {total_steps} steps, or a fraction of the run such as 0.03",
                remedy="lower train.warmup or train for more steps",
            )

    def lr_factor(self, step: int) -> float:
        """Return the factor in (0, 1] that multiplies the learning rates in a step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.kind == "linear" else 1.0
