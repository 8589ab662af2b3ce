"""Registry of task metrics with their primary scores.

A new metric is a module with a function `score_NAME(cases) -> MetricResult`, an entry in
TASK_METRICS, and its name in config.TaskName. Other packages add metrics as plug-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finesight.config import MetricSpec, TaskName
from finesight.errors import UserError
from finesight.evaluate import (
    box_metrics,
    caption_metrics,
    custom_metric,
    json_metrics,
    latex_metrics,
    text_metrics,
)
from finesight.evaluate.eval_case import (
    EvalCase,
    MetricFn,
    MetricResult,
    MetricValues,
    ReferenceAnswer,
    mean_metrics,
)
from finesight.plugins import Registry


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """Scoring function of a task, with its primary score and the references it requires.

    Attributes:
        primary_metric: Primary score (higher is better); None for the first score.
    """

    primary_metric: str | None
    score_fn: MetricFn
    reference_kind: Literal["text", "box", "json", "anything"] = "text"


_BUILT_IN: dict[TaskName, TaskMetric] = {
    "captions": TaskMetric("cider_d", caption_metrics.score_captions),
    "latex": TaskMetric("similarity", latex_metrics.score_latex),
    "ocr": TaskMetric("similarity", text_metrics.score_ocr),
    "qa": TaskMetric("anls", text_metrics.score_qa),
    "classification": TaskMetric("accuracy", text_metrics.score_classification),
    "json": TaskMetric("f1", json_metrics.score_json, reference_kind="json"),
    "grounding": TaskMetric("accuracy_at_0.5", box_metrics.score_grounding, reference_kind="box"),
    "detection": TaskMetric("f1_at_0.5", box_metrics.score_detection, reference_kind="box"),
}
TASK_METRICS = Registry("metrics", TaskMetric, _BUILT_IN)

LOWER_IS_BETTER = frozenset({"edit_distance", "cer", "wer", "validation_loss"})


def get_task_metric(metric: MetricSpec) -> TaskMetric:
    """Return the task metric of a setting; a custom metric is loaded from its file.

    Raises:
        UserError: The file of the custom metric is invalid.
    """
    path_and_function = custom_metric.parse_metric_path(metric)
    if path_and_function is not None:
        return TaskMetric(
            None, custom_metric.load_custom_metric(*path_and_function), reference_kind="anything"
        )
    return TASK_METRICS[metric]


def check_references(metric: MetricSpec, references: Sequence[ReferenceAnswer]) -> None:
    """Reject references without the content that a metric compares.

    Without reference boxes, for example, an answer without boxes would be a perfect grounding
    result.

    Raises:
        UserError: No reference has the required content.
    """
    task = get_task_metric(metric)
    reference_kind = task.reference_kind
    has_reference = [_has_reference_kind(reference_kind, reference) for reference in references]
    if any(has_reference) and (reference_kind != "json" or all(has_reference)):
        if metric not in _BUILT_IN:
            _dry_run_metric(metric, task.score_fn, references[has_reference.index(True)])
        return
    problem = f"none of {len(references)} references has {reference_kind} content"
    expected = f"samples whose last turn has a {reference_kind} part"
    if reference_kind == "json":
        expected = "samples whose last turn is a JSON object or list"
        if any(has_reference):
            text = references[has_reference.index(False)][0][0]
            problem = f"the reference {text[:80]!r} is not JSON"
    fitting = [
        name
        for name, other in _BUILT_IN.items()
        if all(_has_reference_kind(other.reference_kind, reference) for reference in references)
    ]
    remedy = f"choose a metric that fits the answers: {', '.join(fitting) or 'none fits'}"
    if reference_kind == "box":
        remedy += "; or import the boxes of a table: --map box=COLUMN --map label=COLUMN"
    raise UserError(problem, where=f"metric {metric}", expected=expected, remedy=remedy)


def _has_reference_kind(reference_kind: str, reference: ReferenceAnswer) -> bool:
    texts, reference_boxes = reference
    if reference_kind == "json":
        return any(json_metrics.parse_form(text) is not None for text in texts)
    if reference_kind == "box":
        return bool(reference_boxes)
    return reference_kind == "anything" or bool("".join(texts).strip())


def _dry_run_metric(metric: MetricSpec, metric_fn: MetricFn, reference: ReferenceAnswer) -> None:
    """Score a reference and an empty answer with a custom metric or a plug-in.

    Errors then occur before generation.
    """
    texts, reference_boxes = reference
    answers = (texts[0], reference_boxes), ("", ())
    cases = [EvalCase(text, boxes, texts, reference_boxes) for text, boxes in answers]
    reserved_names = metric_fn(cases).scores.keys() & (LOWER_IS_BETTER | {"ended_with_eos"})
    for name in sorted(reserved_names):
        raise UserError(
            f"the score name {name} is reserved",
            where=f"metric {metric}",
            expected="an unreserved name; custom scores must be higher for better answers",
            remedy=f"rename the score; return 1 - {name} for an error rate",
        )


def compute_metrics(metric: MetricSpec, cases: Sequence[EvalCase]) -> MetricResult:
    """Compute the scores of a task and the share of completions with an end token."""
    assert cases, "no cases to score"
    metric_result = get_task_metric(metric).score_fn(cases)
    eos_fn = mean_metrics([{"ended_with_eos": float(case.ended_with_eos)} for case in cases])
    return replace(metric_result, estimators=metric_result.estimators | eos_fn)


def get_primary_metric(metric: MetricSpec, scores: MetricValues) -> str:
    """Return the name of the primary score; for a custom metric, the first score."""
    task = TASK_METRICS.get(metric)
    return (task.primary_metric if task else None) or next(iter(scores))
