"""Custom metric of mathematical answers: `eval.metric: benchmarks/math_answer.py:correct`.

It equals the reward `math`: an answer such as \\boxed{4} counts if math-verify finds it equal to a
reference. It requires the extra `latex`.
"""

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward_scorer import RewardScorer
from finesight.settings.config import parse_reward

scorer = RewardScorer([parse_reward({"name": "math"})])


def correct(case: EvalCase) -> float:
    """Return 1 for an answer that equals a reference as a formula, else 0."""
    ((score,),) = scorer.score([case])
    return score or 0.0
