"""Comparison of formulas by math-verify, in worker processes."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward import Reward
from finesight.evaluate.reward_workers import RewardWorkers
from finesight.evaluate.text_metrics import strip_math_delimiters
from finesight.files.worker_pool import JobOutput, WorkerJobError, WorkerLimitError
from finesight.reward_components import RewardSettings

MAX_CPU_S = 5.0
"""Maximum seconds of CPU time for a response."""


class MathReward(Reward[RewardSettings]):
    """1 for an answer that equals a reference as a formula; None without such a reference."""

    def __init__(self, settings: RewardSettings, workers: RewardWorkers) -> None:
        super().__init__(settings, workers)
        self.pool = workers.open_pool(import_module, "math_verify")

    def score(self, case: EvalCase) -> float | None:
        try:
            with self.pool.borrow_worker() as worker:
                score: float | None = worker.call(_verify, case, max_cpu_s=MAX_CPU_S).value
        except (WorkerLimitError, WorkerJobError):  # such as nested powers
            return 0.0
        return score


def _verify(math_verify: Any, case: EvalCase) -> JobOutput:
    """Compare formulas in a worker process, whose limits replace the time-outs of the package."""
    parse = partial(math_verify.parse, parsing_timeout=None)
    expected = [parse(f"${strip_math_delimiters(text)}$") for text in case.references]
    if not any(expected):
        return JobOutput()
    answers = [parse(case.answer), parse(f"${strip_math_delimiters(case.answer)}$")]
    verify = partial(math_verify.verify, timeout_seconds=None)
    return JobOutput(float(any(verify(one, found) for one in expected for found in answers)))
