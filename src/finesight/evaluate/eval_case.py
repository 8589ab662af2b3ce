"""Evaluation cases (prediction and references), and results of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finesight.errors import UserError
from finesight.evaluate.bootstrap import (
    BOUNDED,
    ConfidenceInterval,
    ScoreBounds,
    ScoreEstimator,
    compute_intervals,
    estimate_mean,
)
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import DEFAULT_SIZE
from finesight.samples.sample import BoxPart, Sample, join_text

MetricValues = dict[str, float]


ReferenceAnswer = tuple[tuple[str, ...], tuple[BoxPart, ...]]
"""Reference texts, any of which is correct, and reference boxes, all of which are expected."""


@dataclass(frozen=True, slots=True)
class EvalCase:
    """Prediction and references of one evaluated sample.

    Attributes:
        references: Reference texts; any of them is correct.
        reference_boxes: Reference boxes; all of them are expected.
        image_size: Height and width in pixels of the image that `boxes` refer to.
        environment_reward: Reward that the environment gave to an episode; None without one.
    """

    answer: str
    boxes: tuple[BoxPart, ...]
    references: tuple[str, ...]
    reference_boxes: tuple[BoxPart, ...]
    id: str = ""
    ended_with_eos: bool = True
    image_size: ImageSize = DEFAULT_SIZE
    environment_reward: float | None = None


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
        notes = {}
        for name, one in self.estimators.items():
            note = one.get_missing_reason() or one.note
            if note:
                notes[name] = note
        return notes


def group_notes(notes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the different names of scores by note, from pairs of name and note."""
    names_by_note: dict[str, dict[str, None]] = {}
    for name, note in notes:
        if note:
            names_by_note.setdefault(note, {})[name] = None
    return {note: list(names) for note, names in names_by_note.items()}


def note_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Format one line per distinct note, preceded by the names of its scores."""
    lines = []
    for note, names in group_notes(notes).items():
        lines.append(f"{', '.join(names)}: {note}")
    return lines


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
    estimators = {}
    for metric, name in source_by_metric.items():
        values = np.array([scores[name] for scores in per_sample], np.float64)
        own_bounds = bounds.get(metric, BOUNDED) if isinstance(bounds, Mapping) else bounds
        estimators[metric] = estimate_mean(values, own_bounds)
    return estimators


def get_reference_answer(sample: Sample, *, has_reasoning: bool = False) -> ReferenceAnswer:
    """Return the reference texts and boxes of a sample.

    The first text is that of the last turn with its tool calls, followed by `sample.references`.
    With `has_reasoning`, reasoning before the answer is removed.

    Raises:
        UserError: The last turn is not an assistant turn, or its answer is undesirable.
    """
    last = sample.messages[-1]
    is_wrong = sample.label is False
    if is_wrong and sample.references:
        return sample.references, ()
    if is_wrong or last.role != "assistant":
        state = f"ends with a {last.role} turn"
        if is_wrong:
            state = "has the label false"
        raise UserError(
            f"sample {sample.id!r} {state}",
            expected="an assistant turn with the reference answer at the end",
            remedy="leave out samples without a correct answer, or predict their answers",
        )
    # Slow to import, and reports need the results of evaluations only.
    from finesight.encode.renderer import split_reasoning

    content = last.content
    if has_reasoning:
        content = split_reasoning(content).answer
    boxes = tuple(part for part in content if isinstance(part, BoxPart))
    return (join_text(content), *sample.references), boxes
