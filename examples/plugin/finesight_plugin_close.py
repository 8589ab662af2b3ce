"""Reward for finesight: the closeness of a number to that of the reference."""

from typing import Annotated

from pydantic import Field

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings
from finesight.settings.setting_types import CoercedFloat


class Settings(RewardSettings):
    tolerance: Annotated[CoercedFloat, Field(gt=0.0)] = 0.1


class CloseReward(Reward[Settings]):
    def score(self, case):
        try:
            answer, reference = float(case.answer), float(case.references[0])
        except ValueError:
            return 0.0
        error = abs(answer - reference) / max(1.0, abs(reference))
        return max(0.0, 1.0 - error / self.settings.tolerance)


COMPONENT = RewardComponent(
    kind="rewards",
    name="close",
    title="Close number",
    settings=Settings,
    implementation="finesight_plugin_close:CloseReward",
)
