"""The runs that follow each other in the making of finesight-tiny."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.synth.tasks import FIRST, MIXTURE


@dataclass(frozen=True)
class Stage:
    """A run: its name, the tasks it learns, from how many pictures of them, in how many steps.

    Pictures take longer to draw than to learn from, so runs start with what there is: those of a
    mixture are the same in every run, each has those of the one before and more.
    """

    name: str
    mixture: Mapping[str, float]
    pictures: int
    steps: int
    schedule: Literal["constant", "linear"]


STAGES = (
    Stage("first", FIRST, 100_000, 700, "constant"),
    Stage("second", MIXTURE, 150_000, 1_300, "constant"),
    Stage("third", MIXTURE, 350_000, 2_000, "constant"),
    Stage("fourth", MIXTURE, 600_000, 11_000, "linear"),
)

LAST = STAGES[-1].name
