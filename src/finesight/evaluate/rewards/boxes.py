"""Overlap, hits and sizes of boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase


class BoxReward(Reward[RewardSettings]):
    """Mean over the boxes of IoU, hit and ratio of the areas.

    The hit is 1 if the center of a box lies in its reference. Alone, it would favor small boxes,
    and the IoU large ones (Zhou et al. 2025, GUI-G1). Missing and additional boxes cost the same.
    A reference point is hit within `MAX_DISTANCE`, and its overlap replaces the ratio, too.
    """

    def score(self, case: EvalCase) -> float:
        from finesight.evaluate.box_metrics import match_boxes
        from finesight.samples.boxes import box_area, contains_center

        predicted = case.boxes
        references = case.reference_boxes
        max_boxes = max(len(predicted), len(references))
        if max_boxes == 0:
            return 1.0
        total = 0.0
        for i, j, overlap in match_boxes(predicted, references, case.image_size):
            box = predicted[i].xyxy
            reference = references[j].xyxy
            smaller, larger = sorted(map(box_area, (box, reference)))
            is_point = not box_area(reference)
            if is_point:
                size = overlap
            elif larger:
                size = smaller / larger
            else:
                size = 0.0
            is_hit = is_point or contains_center(reference, box)
            total += (overlap + is_hit + size) / 3
        return total / max_boxes


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="boxes",
    title="Boxes",
    implementation="finesight.evaluate.rewards.boxes:BoxReward",
    metrics=("grounding", "detection"),
    position=2,
)
