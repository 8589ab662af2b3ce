"""Length of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings
from finesight.settings.setting_types import PositiveInt

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase


class Settings(RewardSettings):
    """Item `length` of `rewards` in a recipe.

    `max_length` is the number of characters up to which the reward is 1.
    """

    max_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.max_length is None:
            raise ValueError("the reward length requires max_length")
        return self


class LengthReward(Reward[Settings]):
    """1 up to `max_length` characters, then linearly less, and 0 from twice as many."""

    def score(self, case: EvalCase) -> float:
        max_length = self.settings.max_length
        assert max_length is not None, "no maximum"
        excess = len(case.answer) - max_length
        return min(1.0, max(0.0, 1.0 - excess / max_length))


COMPONENT = RewardComponent[Settings](
    kind="rewards",
    name="length",
    title="Length",
    settings=Settings,
    implementation="finesight.evaluate.rewards.length:LengthReward",
    compares_references=False,
    position=5,
)
