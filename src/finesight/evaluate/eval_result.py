"""Results of evaluations, selection of their samples, and the best one of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from finesight.evaluate.bootstrap import ConfidenceInterval


def select_eval_samples(indices: Sequence[int], limit: int | None) -> list[int]:
    """Return a random subset of at most `limit` sample indices, in their order.

    Each index has a fixed random priority. The subset is therefore the same in every run, and
    contains every smaller one. Samples are not taken from the start, because a file may be sorted.
    """
    if limit is None or limit >= len(indices):
        return list(indices)
    generator = np.random.Philox(np.random.SeedSequence(0))
    priorities_N = generator.random_raw(max(indices) + 1)[np.array(indices)]
    chosen_K = np.sort(np.argsort(priorities_N, kind="stable")[:limit])
    return [indices[position] for position in chosen_K]


class BestEval(BaseModel):
    """Step and scores of the best evaluation of a run so far.

    Evaluations are ranked by the primary metric. The validation loss breaks ties, and ranks
    evaluations without a metric.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    validation_loss: float
    primary_metric: str | None = None
    primary_score: float | None = None
    num_samples: int | None = None
    num_loss_samples: int | None = None
    sample_set: str | None = None
    score_set: str | None = None

    def is_comparable_to(self, other: BestEval) -> bool:
        """Return whether both evaluations have the same metric and samples."""
        return self.primary_metric == other.primary_metric and self.has_scores_of(other)

    def has_scores_of(self, other: BestEval) -> bool:
        """Return whether the scores of both evaluations are of the same samples."""
        # Results of earlier versions have one digest.
        own_set = self.score_set or self.sample_set
        other_set = other.score_set or other.sample_set
        return self.num_samples == other.num_samples and own_set == other_set

    def has_loss_of(self, other: BestEval) -> bool:
        """Return whether the losses of both evaluations are means over the same samples."""
        has_same_count = self.num_loss_samples == other.num_loss_samples
        return has_same_count and self.sample_set == other.sample_set

    def is_better_than(self, other: BestEval | None) -> bool:
        """Return whether this evaluation is better than another one.

        It is also considered better than None and than an evaluation that is not comparable. Losses
        over different samples are not compared.
        """
        if other is None or not self.is_comparable_to(other):
            return True
        own_score = self.primary_score or 0.0
        other_score = other.primary_score or 0.0
        if own_score != other_score:
            return own_score > other_score
        return self.has_loss_of(other) and self.validation_loss < other.validation_loss


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Result of one evaluation on the validation split.

    Attributes:
        step: Number of finished steps.
        validation_loss: Mean loss, for supervised fine-tuning per supervised token in nats.
        loss_metrics: Metrics of the objective, such as `rewards/accuracies`; empty without any.
        scores: Task metrics by name; empty without a metric.
        primary_metric: Name of the metric that ranks evaluations; None without a metric.
        intervals: Confidence interval of each score; None if there is none.
        details: Additional results of the task, such as scores per class.
        notes: Reasons for missing intervals, and warnings.
        num_samples: Number of validation samples of the scores; None if unknown.
        num_loss_samples: Number of validation samples of the loss; None if unknown.
        sample_set: Digest of the samples of the loss, without unreadable ones. Results are compared
            only if it is equal. None for results of earlier versions.
        score_set: Digest of the samples of the scores. None for results of earlier versions.
        full: Result of all samples, if this is the result of a subset and all were evaluated.
    """

    step: int
    validation_loss: float
    scores: dict[str, float]
    primary_metric: str | None
    intervals: dict[str, ConfidenceInterval | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    num_loss_samples: int | None = None
    sample_set: str | None = None
    score_set: str | None = None
    loss_metrics: dict[str, float] = field(default_factory=dict)
    full: EvalResult | None = None

    @property
    def on_all_samples(self) -> EvalResult:
        """Result of all evaluated samples, for the comparison before and after training."""
        return self.full or self

    @property
    def primary_score(self) -> float | None:
        """Score of the primary metric; None without a metric."""
        if self.primary_metric is None:
            return None
        return self.scores[self.primary_metric]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the `metrics.jsonl` line of this evaluation."""
        return asdict(self)

    def as_best_eval(self) -> BestEval:
        """Return the fields that rank evaluations."""
        return BestEval.model_validate(self, from_attributes=True)

    @classmethod
    def from_metrics(cls, line: dict[str, Any]) -> EvalResult | None:
        """Parse the evaluation in a line of `metrics.jsonl`; return None for other lines."""
        if "validation_loss" not in line:
            return None
        intervals = {}
        for name, ends in line.get("intervals", {}).items():
            intervals[name] = ConfidenceInterval(*ends) if ends else None
        values = {one.name: line[one.name] for one in fields(cls) if one.name in line}
        # Results of earlier versions have one count and one digest.
        values.setdefault("num_loss_samples", line.get("num_samples"))
        values.setdefault("score_set", line.get("sample_set"))
        full = cls.from_metrics(line.get("full") or {})
        return cls(**values | {"intervals": intervals, "full": full})


def find_best_eval(results: Sequence[EvalResult]) -> tuple[EvalResult | None, int]:
    """Find the best evaluation with the metric and samples of the last one.

    Evaluations are ranked by the primary metric, then by the validation loss. The evaluation before
    the first step is ignored, because scores may drop at first and recover.

    Args:
        results: Evaluations of the run, in order.

    Returns:
        The first of the best evaluations, and the number of comparable ones after it.
    """
    evaluations = [(result, result.as_best_eval()) for result in results]
    comparable = []
    for result, evaluation in evaluations:
        _, last = evaluations[-1]
        if result.step and evaluation.is_comparable_to(last):
            comparable.append((result, evaluation))
    if not comparable:
        return None, 0
    best = 0
    for i, (_, evaluation) in enumerate(comparable):
        _, best_evaluation = comparable[best]
        if evaluation.is_better_than(best_evaluation):
            best = i
    best_result, _ = comparable[best]
    return best_result, len(comparable) - 1 - best
