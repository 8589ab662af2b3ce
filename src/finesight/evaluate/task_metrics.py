"""Registry of task metrics with their primary scores.

A new metric is a module with a function `score_NAME(cases) -> MetricResult`, entries in
TASK_METRICS and METRIC_TEXTS, and its name in config.TaskName. Other packages add metrics as
plug-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from finesight.config import MetricSpec, TaskName
from finesight.data.boxes import box_area
from finesight.data.sample import TOOL_CALL_END, TOOL_CALL_TEXT
from finesight.errors import UserError, format_count
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
from finesight.evaluate.score_function import (
    build_function_error,
    build_result_error,
    read_score,
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
    reference_kind: Literal["text", "box", "box or point", "json", "tool call", "anything"] = "text"


_BUILT_IN: dict[TaskName, TaskMetric] = {
    "captions": TaskMetric("cider_d", caption_metrics.score_captions),
    "latex": TaskMetric("similarity", latex_metrics.score_latex),
    "ocr": TaskMetric("similarity", text_metrics.score_ocr),
    "qa": TaskMetric("anls", text_metrics.score_qa),
    "classification": TaskMetric("accuracy", text_metrics.score_classification),
    "json": TaskMetric("f1", json_metrics.score_json, reference_kind="json"),
    "tool_calls": TaskMetric("exact", json_metrics.score_tool_calls, reference_kind="tool call"),
    "grounding": TaskMetric("accuracy_at_0.5", box_metrics.score_grounding, reference_kind="box"),
    "detection": TaskMetric("f1_at_0.5", box_metrics.score_detection, reference_kind="box"),
    "pointing": TaskMetric("f1", box_metrics.score_pointing, reference_kind="box or point"),
}
TASK_METRICS = Registry("metrics", TaskMetric, _BUILT_IN)

VALIDATION_LOSS = "validation_loss"

METRIC_TEXTS = {
    VALIDATION_LOSS: (
        "validation loss",
        "cross-entropy of the reference answers, in nats per token; for pairs, mean loss of a pair",
    ),
    "similarity": ("similarity", "1 minus the normalized edit distance"),
    "exact": ("exact match", "answers equal to a reference"),
    "exact_folded": (
        "exact match, ignoring case and width",
        "exact match, ignoring case and character width",
    ),
    "edit_distance": ("edit distance", "token edits per answer"),
    "cer": ("CER", "character edits divided by the characters of the references"),
    "wer": ("WER", "word edits divided by the words of the references"),
    "rendered": ("equal when rendered", "formulas whose rendered image equals that of a reference"),
    "rendered_share": ("renderable share", "samples with a reference that can be rendered"),
    "ended_with_eos": ("ended with EOS", "answers that ended before the token limit"),
    "accuracy": ("accuracy", "answers with the correct class"),
    "bleu": ("BLEU", "precision of n-grams of up to four tokens"),
    "f1": ("F1", "harmonic mean of precision and recall over words, classes, fields or points"),
    "ap": ("AP", "average precision over ten IoU thresholds, 0.5 to 0.95"),
    "accuracy_at_0.5": ("accuracy at IoU 0.5", "boxes with an IoU of at least 0.5"),
    "accuracy_at_0.75": ("accuracy at IoU 0.75", "boxes with an IoU of at least 0.75"),
    "distance": ("distance", "distance of points as a fraction of the image diagonal"),
    "mean_iou": ("mean IoU", "overlap with the reference boxes"),
    "parse_rate": ("parsable answers", "answers that could be parsed"),
    "anls": ("ANLS", "similarity to a reference, 0 below 0.5"),
    "cider_d": ("CIDEr-D", "TF-IDF n-gram similarity to the reference captions"),
    "rouge_l": ("ROUGE-L", "longest common subsequence of words"),
    "iou": ("IoU", ""),
    "hit": ("hit at IoU 0.5", ""),
    "hit_at_0.75": ("hit at IoU 0.75", ""),
    "f1_macro": ("macro F1", ""),
    "f1_at_0.5": ("F1 at IoU 0.5", ""),
    "precision_at_0.5": ("precision at IoU 0.5", ""),
    "recall_at_0.5": ("recall at IoU 0.5", ""),
    "ap_50": ("AP at IoU 0.5", ""),
    "ap_75": ("AP at IoU 0.75", ""),
    **{f"bleu_{order}": (f"BLEU-{order}", "") for order in range(1, 5)},
    "rewards/accuracies": ("reward accuracy", "pairs whose chosen answer has the larger reward"),
    "rewards/margins": ("reward margin", "reward of the chosen minus that of the rejected answer"),
}
"""Display names and descriptions of built-in metrics. Others are displayed by their own name."""

PAIR_METRICS = "rewards/accuracies", "rewards/margins"
"""Metrics of preference pairs in steps and evaluations, computed with the loss."""

LOWER_IS_BETTER = frozenset({"edit_distance", "cer", "wer", "distance", VALIDATION_LOSS})


def get_task_metric(metric: MetricSpec) -> TaskMetric:
    """Return the task metric of a setting.

    Raises:
        UserError: The file of a custom metric is missing, or a plug-in cannot be imported.
    """
    location = custom_metric.parse_metric_path(metric)
    if location is not None:
        return TaskMetric(None, custom_metric.load_custom_metric(*location), "anything")
    task = TASK_METRICS[metric]
    plugin = TASK_METRICS.find_plugin(metric)
    if plugin is None:
        return task
    return replace(task, score_fn=partial(_score_by_plugin, plugin.describe(), task))


def _score_by_plugin(where: str, task: TaskMetric, cases: Sequence[EvalCase]) -> MetricResult:
    """Score cases by the metric of a plug-in. Raises ScoringError if it fails."""
    try:
        result = task.score_fn(cases)
        scores = result.scores
        per_sample = [*map(dict, result.per_sample)]
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        context = f"for {format_count(len(cases), 'sample')}, the first one {cases[0].id!r}"
        raise build_function_error(error, where, context) from error
    if len(per_sample) != len(cases):
        what = f"scores of {len(per_sample)} samples for {format_count(len(cases), 'sample')}"
        raise build_result_error(what, where)
    names = per_sample[0].keys()
    primary = task.primary_metric
    for case, values in zip(cases, per_sample, strict=True):
        if values.keys() != names or not names:
            what = f"the scores {', '.join(map(str, values))} of sample {case.id!r}"
            raise build_result_error(f"{what} after {', '.join(map(str, names))}", where)
        for name, value in values.items():
            values[name] = read_score(value, name, f"for sample {case.id!r}", where)
    for name, value in scores.items():
        read_score(value, name, "for all samples", where)
    if primary is not None and primary not in scores:
        what = f"no score {primary!r}, the primary one, in {', '.join(map(str, scores))}"
        raise build_result_error(what, where)
    return replace(result, per_sample=per_sample)


def check_task_metric(metric: MetricSpec) -> None:
    """Load a metric. Raises UserError if a plug-in, or the file of a custom metric, is invalid."""
    get_task_metric(metric)
    if (location := custom_metric.parse_metric_path(metric)) is not None:
        with custom_metric.open_function(*location, "metric") as function:
            function.load()


def check_references(
    metric: MetricSpec, references: Sequence[ReferenceAnswer], ids: Sequence[str] = ()
) -> None:
    """Reject references, of samples with `ids`, without the content that a metric compares.

    Without reference boxes, for example, an answer without boxes would be correct grounding.

    Raises:
        UserError: No reference has the required content.
    """
    task = get_task_metric(metric)
    reference_kind = task.reference_kind
    has_reference = [has_reference_kind(reference_kind, reference) for reference in references]
    if any(has_reference) and (reference_kind != "json" or all(has_reference)):
        if metric not in _BUILT_IN:
            first = has_reference.index(True)
            sample_id = ""
            if ids:
                sample_id = ids[first]
            _dry_run_metric(metric, task.score_fn, references[first], sample_id)
        return
    fitting = []
    for name, other in _BUILT_IN.items():
        if all(has_reference_kind(other.reference_kind, one) for one in references):
            fitting.append(name)
    problem = f"none of {len(references)} references has {reference_kind} content"
    expected = f"samples whose last turn has a {reference_kind} part"
    if reference_kind == "json":
        expected = "samples whose last turn is a JSON object or list"
        first = has_reference.index(False)
        source = f"reference {first + 1}"
        if ids:
            source = f"sample {ids[first]!r}"
        (text, *_), boxes = references[first]
        if boxes and not text.strip():
            problem = f"the answer of {source} is a plain list of boxes"
            fitting = ["pointing"]
            if has_reference_kind("box", references[first]):
                fitting = ["detection"]
        elif any(has_reference):
            problem = f"the answer {text[:80]!r} of {source} is not JSON"
    remedy = f"choose a metric that fits the answers: {', '.join(fitting) or 'none fits'}"
    if "box" in reference_kind:
        remedy += "; or import the boxes of a table: --map box=COLUMN --map label=COLUMN"
    raise UserError(problem, where=f"metric {metric}", expected=expected, remedy=remedy)


def has_reference_kind(reference_kind: str, reference: ReferenceAnswer) -> bool:
    """Return whether a reference has the content that a metric compares."""
    texts, reference_boxes = reference
    if reference_kind == "json":
        return any(json_metrics.parse_form(text) is not None for text in texts)
    if reference_kind == "tool call":
        return any(TOOL_CALL_END in text and TOOL_CALL_TEXT.search(text) for text in texts)
    if "box" in reference_kind:
        return any(reference_kind != "box" or box_area(box.xyxy) for box in reference_boxes)
    return reference_kind == "anything" or bool("".join(texts).strip())


def _dry_run_metric(
    metric: MetricSpec, metric_fn: MetricFn, reference: ReferenceAnswer, sample_id: str
) -> None:
    """Score a reference and an empty answer, so that errors of a metric precede generation."""
    texts, reference_boxes = reference
    correct = EvalCase(texts[0], reference_boxes, texts, reference_boxes, sample_id)
    empty = EvalCase("", (), texts, reference_boxes, sample_id)
    scores = metric_fn([correct, empty]).scores
    reserved_names = scores.keys() & (LOWER_IS_BETTER | {"ended_with_eos"})
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
    if task and task.primary_metric:
        return task.primary_metric
    return next(iter(scores))
