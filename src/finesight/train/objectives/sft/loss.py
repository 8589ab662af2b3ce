"""Supervised fine-tuning: the mean cross entropy of the supervised tokens."""

from __future__ import annotations

from finesight.train.objectives.objective import Objective
from finesight.train.objectives.sft import Settings


class SftObjective(Objective[Settings]):
    """Cross entropy of the answers, which is the default of `Objective`."""
