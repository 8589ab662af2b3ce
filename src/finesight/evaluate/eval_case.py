"""Evaluation cases (prediction and references), metric results, and results of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from finesight.data.image_file import DEFAULT_SIZE, ImageSize
from finesight.data.sample import BoxPart, Sample, join_text
from finesight.errors import UserError
from finesight.evaluate.bootstrap import (
    BOUNDED,
    ConfidenceInterval,
    ScoreBounds,
    ScoreEstimator,
    compute_intervals,
    estimate_mean,
)

MetricValues = dict[str, float]


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


ReferenceAnswer = tuple[tuple[str, ...], tuple[BoxPart, ...]]
"""Reference texts, any of which is correct, and reference boxes, all of which are expected."""


@dataclass(frozen=True, slots=True)
class EvalCase:
    """Prediction and references of one evaluated sample.

    Attributes:
        references: Reference texts; any of them is correct.
        reference_boxes: Reference boxes; all of them are expected.
        image_size: Height and width in pixels of the image that `boxes` refer to.
    """

    answer: str
    boxes: tuple[BoxPart, ...]
    references: tuple[str, ...]
    reference_boxes: tuple[BoxPart, ...]
    id: str = ""
    ended_with_eos: bool = True
    image_size: ImageSize = DEFAULT_SIZE


@dataclass(frozen=True, slots=True)
class MetricResult:
    """Result of a task metric on N predictions.

    Attributes:
        details: Additional machine-readable results, such as a confusion matrix or scores by field.
    """

    per_sample: list[MetricValues]
    estimators: dict[str, ScoreEstimator]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> MetricValues:
        """Scores over all predictions, by name."""
        return {name: one.score for name, one in self.estimators.items()}

    def intervals(self) -> dict[str, ConfidenceInterval | None]:
        """Return the 95 % confidence interval of each score; None if undefined."""
        return compute_intervals(self.estimators)

    def notes(self) -> dict[str, str]:
        """Return warnings and reasons for missing intervals, by the name of the score."""
        reasons = {n: one.get_missing_reason() or one.note for n, one in self.estimators.items()}
        return {name: note for name, note in reasons.items() if note}


def group_notes(notes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the different names of scores by note, from pairs of name and note."""
    names_by_note: dict[str, dict[str, None]] = {}
    for name, note in notes:
        if note:
            names_by_note.setdefault(note, {})[name] = None
    return {note: list(names) for note, names in names_by_note.items()}


def note_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Format one line per distinct note, preceded by the names of its scores."""
    return [f"{', '.join(names)}: {note}" for note, names in group_notes(notes).items()]


MetricFn = Callable[[Sequence[EvalCase]], MetricResult]


def mean_metrics(
    per_sample: Sequence[MetricValues],
    names: Mapping[str, str] | None = None,
    bounds: Mapping[str, ScoreBounds] | ScoreBounds = BOUNDED,
) -> dict[str, ScoreEstimator]:
    """Return the estimators of the means of per-sample scores.

    Args:
        names: Name of the per-sample score by the name of its mean; by default, all scores with the
            same names.
        bounds: Bounds of all scores, or of some by name; others are in [0, 1].
    """
    source_by_metric = names or {name: name for name in per_sample[0]}
    return {
        metric: estimate_mean(
            np.array([scores[name] for scores in per_sample], np.float64),
            bounds.get(metric, BOUNDED) if isinstance(bounds, Mapping) else bounds,
        )
        for metric, name in source_by_metric.items()
    }


def get_reference_answer(sample: Sample, *, has_reasoning: bool = False) -> ReferenceAnswer:
    """Return the reference texts and boxes of a sample.

    The first text is that of the last turn with its tool calls, followed by `sample.references`.
    With `has_reasoning`, reasoning before the answer is removed.

    Raises:
        UserError: The last turn is not an assistant turn, or its answer is undesirable.
    """
    last, is_wrong = sample.messages[-1], sample.label is False
    if is_wrong and sample.references:
        return sample.references, ()
    if is_wrong or last.role != "assistant":
        state = "has the label false" if is_wrong else f"ends with a {last.role} turn"
        raise UserError(
            f"sample {sample.id!r} {state}",
            expected="an assistant turn with the reference answer at the end",
            remedy="leave out samples without a correct answer, or predict their answers",
        )
    # Slow to import, and reports need the results of evaluations only.
    from finesight.encode.renderer import split_reasoning

    content = split_reasoning(last.content).answer if has_reasoning else last.content
    boxes = tuple(part for part in content if isinstance(part, BoxPart))
    return (join_text(content), *sample.references), boxes


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
        own, others = ((one.num_samples, one.score_set or one.sample_set) for one in (self, other))
        return own == others

    def has_loss_of(self, other: BestEval) -> bool:
        """Return whether the losses of both evaluations are means over the same samples."""
        own, others = ((one.num_loss_samples, one.sample_set) for one in (self, other))
        return own == others

    def is_better_than(self, other: BestEval | None) -> bool:
        """Return whether this evaluation is better than another one.

        It is also considered better than None and than an evaluation that is not comparable. Losses
        over different samples are not compared.
        """
        if other is None or not self.is_comparable_to(other):
            return True
        own_score, other_score = self.primary_score or 0.0, other.primary_score or 0.0
        return own_score > other_score or (
            own_score == other_score
            and self.has_loss_of(other)
            and self.validation_loss < other.validation_loss
        )


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
        return None if self.primary_metric is None else self.scores[self.primary_metric]

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
        intervals = {
            name: ConfidenceInterval(*ends) if ends else None
            for name, ends in line.get("intervals", {}).items()
        }
        names = (field.name for field in fields(cls))
        values = {name: line[name] for name in names if name in line}
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
    ranked = [(result, result.as_best_eval()) for result in results]
    comparable = [(r, e) for r, e in ranked if r.step and e.is_comparable_to(ranked[-1][1])]
    best = 0
    for i, (_, current) in enumerate(comparable):
        if current.is_better_than(comparable[best][1]):
            best = i
    return (comparable[best][0], len(comparable) - 1 - best) if comparable else (None, 0)
