"""Equality of an answer and a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase


class ExactReward(Reward[RewardSettings]):
    """1 if the answer equals a reference up to whitespace."""

    def score(self, case: EvalCase) -> float:
        from finesight.evaluate.text_metrics import normalize_text

        return float(normalize_text(case.answer) in map(normalize_text, case.references))


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="exact",
    title="Equal answers",
    implementation="finesight.evaluate.rewards.exact:ExactReward",
    position=1,
)
