"""Interface of rewards, which light halves import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from finesight.reward_components import RewardSettingsT

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase
    from finesight.evaluate.reward_workers import RewardWorkers


class Reward(Generic[RewardSettingsT]):
    """Scoring function of responses: the heavy half of a reward.

    Args:
        workers: Processes for code of recipes and packages that may take long, which end with the
            scorer.
    """

    def __init__(self, settings: RewardSettingsT, workers: RewardWorkers) -> None:
        self.settings = settings

    def score(self, case: EvalCase) -> float | None:
        """Return the score of a response, usually from 0 to 1; None for no score.

        Raises:
            RewardError: The settings are invalid for this response.
        """
        raise NotImplementedError
