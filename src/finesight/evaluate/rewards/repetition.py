"""Repetition of words in an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.reward import Reward
from finesight.reward_components import RewardComponent, RewardSettings

if TYPE_CHECKING:
    from finesight.evaluate.eval_case import EvalCase

NGRAM_WORDS = 4
"""Number of words of the n-grams that are counted."""


class RepetitionReward(Reward[RewardSettings]):
    """Share of distinct n-grams of words; 1 for answers without repetition."""

    def score(self, case: EvalCase) -> float:
        words = case.answer.split()
        ngrams = [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]
        if not ngrams:
            return 1.0
        return len(set(ngrams)) / len(ngrams)


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="repetition",
    title="Repetition",
    implementation="finesight.evaluate.rewards.repetition:RepetitionReward",
    compares_references=False,
    position=7,
)
