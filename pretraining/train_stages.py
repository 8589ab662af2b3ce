"""Training stages of finesight-tiny."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from synthetic_tasks.tasks import MAIN_MIXTURE, WARMUP_MIXTURE


@dataclass(frozen=True)
class TrainStage:
    """Settings of one stage.

    Generating images takes longer than training on them, so early stages use the images that exist.
    Each stage with the same mixture uses the images of the previous one and new ones.
    """

    name: str
    mixture: Mapping[str, float]
    num_images: int
    num_steps: int
    lr_schedule: Literal["constant", "linear"]


TRAIN_STAGES = (
    TrainStage("first", WARMUP_MIXTURE, 100_000, 700, "constant"),
    TrainStage("second", MAIN_MIXTURE, 150_000, 1_300, "constant"),
    TrainStage("third", MAIN_MIXTURE, 350_000, 2_000, "constant"),
    TrainStage("fourth", MAIN_MIXTURE, 600_000, 11_000, "linear"),
)

LAST_STAGE = TRAIN_STAGES[-1].name
