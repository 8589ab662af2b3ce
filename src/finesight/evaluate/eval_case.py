"""Data classes of evaluation cases (prediction and references) and metric results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finesight.data.sample import BoxPart, Sample, TextPart
from finesight.encode.renderer import split_reasoning
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
    """

    answer: str
    boxes: tuple[BoxPart, ...]
    references: tuple[str, ...]
    reference_boxes: tuple[BoxPart, ...]
    id: str = ""
    ended_with_eos: bool = True


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
        notes = {
            name: one.get_missing_reason() or one.note for name, one in self.estimators.items()
        }
        return {name: note for name, note in notes.items() if note}


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

    The first text is that of the last turn, followed by `sample.references`. With `has_reasoning`,
    reasoning before the answer is removed.

    Raises:
        UserError: The last turn is not an assistant turn.
    """
    last_message = sample.messages[-1]
    if last_message.role != "assistant":
        raise UserError(
            f"sample {sample.id!r} ends with a {last_message.role} turn",
            expected="an assistant turn with the reference answer at the end",
            remedy="evaluate on samples with answers, or predict their answers",
        )
    content = (
        split_reasoning(last_message.content).answer if has_reasoning else last_message.content
    )
    boxes = tuple(part for part in content if isinstance(part, BoxPart))
    text = "".join(part.text for part in content if isinstance(part, TextPart))
    return (text, *sample.references), boxes
