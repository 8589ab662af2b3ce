"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from finesight.config import StepsOrShare, Train
from finesight.errors import UserError

USUAL_SAVE = 0.25
"""Share of a run between two checkpoints, where the recipe does not say."""


def in_steps(value: StepsOrShare, total: int) -> int:
    """A count of steps as it is, a share as so many of `total` steps, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * total)


def saved_every(train: Train, total: int) -> int:
    """Steps between two checkpoints; 0 where only the last step has one."""
    return in_steps(USUAL_SAVE if train.save_every is None else train.save_every, total)


class Schedule:
    """Factor on every learning rate: up in a straight line, then down by the chosen curve.

    The first step already learns and the last one still does: the factor is never 0.
    """

    def __init__(self, train: Train, total: int) -> None:
        self.kind, self.total = train.schedule, total
        self.warmup = in_steps(train.warmup, total)
        if self.warmup >= total and self.warmup > 1:
            raise UserError(
                f"{self.warmup} steps of warm-up in a run of {total} steps",
                where="train.warmup",
                expected=f"fewer than {total} steps, or a share of the run such as 0.03",
                remedy="set train.warmup lower or train longer",
            )

    def factor(self, step: int) -> float:
        """Within (0, 1], for the step with this number, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1 - share if self.kind == "linear" else 1.0
