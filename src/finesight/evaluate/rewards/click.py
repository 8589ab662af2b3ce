"""Hit of a reference by the first box or point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase


class ClickReward(Reward[RewardSettings]):
    """1 if the first box or point is at a reference."""

    def score(self, case: EvalCase) -> float:
        from finesight.evaluate.box_metrics import measure_closeness

        for found in case.boxes[:1]:
            for reference in case.reference_boxes:
                if found.image != reference.image:
                    continue
                if measure_closeness(found.xyxy, reference.xyxy, case.image_size) > 0:
                    return 1.0
        return 0.0


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="click",
    title="Clicks",
    implementation="finesight.evaluate.rewards.click:ClickReward",
    position=3,
)
