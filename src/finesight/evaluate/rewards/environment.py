"""Reward of the environment of an episode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finesight.components import SettingProblem
from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase


class EnvironmentReward(Reward[RewardSettings]):
    """Result of the method `get_reward` of the environment."""

    def score(self, case: EvalCase) -> float | None:
        return case.environment_reward


def check(settings: RewardSettings, recipe: Any) -> Iterator[SettingProblem]:
    """Yield the problem of a recipe without an environment."""
    sampling = recipe.needs.sampling
    if sampling is None or sampling.episodes is None:
        yield SettingProblem(
            "the reward environment needs an environment",
            "set the environment of the objective, or remove the reward",
        )


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="environment",
    title="Environment",
    implementation="finesight.evaluate.rewards.environment:EnvironmentReward",
    unscored_reason="the environment has no method get_reward, or it returned None",
    check=check,
    position=8,
)
