"""Learning rate schedule: a function of the step, without state."""

from __future__ import annotations

import math

from finesight.config import StepsOrFraction, TrainSettings
from finesight.errors import UserError

DEFAULT_SAVE_INTERVAL = 0.25
"""Default interval between two checkpoints, as a fraction of the run."""


def resolve_steps(value: StepsOrFraction, total_steps: int) -> int:
    """Convert a number of steps or a fraction of the run to steps.

    Fractions are rounded up.
    """
    return value if isinstance(value, int) else math.ceil(value * total_steps)


def resolve_save_interval(train: TrainSettings, total_steps: int) -> int:
    """Return the number of steps between two checkpoints; 0 saves only the last step."""
    return resolve_steps(
        DEFAULT_SAVE_INTERVAL if train.save_every is None else train.save_every, total_steps
    )


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
