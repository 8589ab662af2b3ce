"""Scoring by task metrics, and the references that they require.

A new metric is a module or folder in `evaluate/metrics` with a `MetricComponent`. Other packages
add metrics as plug-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from finesight.errors import UserError, format_count
from finesight.evaluate import custom_metric, json_metrics, python_functions
from finesight.evaluate.bootstrap import UNBOUNDED, estimate_mean, estimate_ratio
from finesight.evaluate.eval_case import (
    EvalCase,
    MetricFn,
    MetricResult,
    MetricValues,
    ReferenceAnswer,
    mean_metrics,
)
from finesight.evaluate.score_function import (
    PythonScoreFunction,
    build_function_error,
    build_result_error,
    read_score,
)
from finesight.metric_components import (
    ENVIRONMENT_REWARD,
    METRICS,
    ReferenceKind,
    get_metric,
    get_score,
)
from finesight.samples.boxes import box_area
from finesight.samples.sample import find_tool_calls
from finesight.settings.config import PYTHON_PREFIX, MetricSpec


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """Scoring function of a task, with its primary score and the references it requires.

    It is also the object of a plug-in for version 0.1, instead of a `MetricComponent`.

    Attributes:
        primary_metric: Primary score (higher is better); None for the first score.
    """

    primary_metric: str | None
    score_fn: MetricFn
    reference_kind: ReferenceKind = "text"


def get_task_metric(metric: MetricSpec) -> TaskMetric:
    """Return the task metric of a setting.

    Raises:
        UserError: The file of a custom metric is missing, a plug-in cannot be imported, or this
            program does not provide a function.
    """
    function = python_functions.find_function(metric)
    if function is not None:
        name = metric.removeprefix(PYTHON_PREFIX)
        scorer = PythonScoreFunction(function, name, "metric")
        score_cases = partial(custom_metric.score_cases, lambda: scorer, scorer.where)
        return TaskMetric(None, score_cases, "anything")
    location = custom_metric.parse_metric_path(metric)
    if location is not None:
        return TaskMetric(None, custom_metric.load_custom_metric(*location), "anything")
    component = METRICS[metric]
    score_fn = METRICS.load_score_fn(metric)
    task = TaskMetric(component.primary_score or None, score_fn, component.reference_kind)
    plugin = METRICS.find_plugin(metric)
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
        if not METRICS.is_built_in(metric):
            first = has_reference.index(True)
            sample_id = ""
            if ids:
                sample_id = ids[first]
            _dry_run_metric(metric, task.score_fn, references[first], sample_id)
        return
    fitting = []
    for component in METRICS.list_built_in():
        if all(has_reference_kind(component.reference_kind, one) for one in references):
            fitting.append(component.name)
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
            fitting = _list_box_metrics(references[first])[:1]
        elif any(has_reference):
            problem = f"the answer {text[:80]!r} of {source} is not JSON"
    remedy = f"choose a metric that fits the answers: {', '.join(fitting) or 'none fits'}"
    if "box" in reference_kind:
        remedy += "; or import the boxes of a table: --map box=COLUMN --map label=COLUMN"
    raise UserError(problem, where=f"metric {metric}", expected=expected, remedy=remedy)


def _list_box_metrics(reference: ReferenceAnswer) -> list[str]:
    """List the metrics of several boxes or points that can compare a reference."""
    fitting = []
    for component in METRICS.list_built_in():
        if component.lists_boxes and has_reference_kind(component.reference_kind, reference):
            fitting.append(component.name)
    return fitting


def has_reference_kind(reference_kind: str, reference: ReferenceAnswer) -> bool:
    """Return whether a reference has the content that a metric compares."""
    texts, reference_boxes = reference
    if reference_kind == "json":
        return any(json_metrics.parse_form(text) is not None for text in texts)
    if reference_kind == "tool call":
        return any(find_tool_calls(text) for text in texts)
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
    own_scores = get_metric(metric).scores
    for name in sorted(scores.keys() - own_scores.keys()):
        if not (get_score(name).lower_is_better or name == "ended_with_eos"):
            continue
        raise UserError(
            f"the score name {name} is reserved",
            where=f"metric {metric}",
            expected="an unreserved name; custom scores must be higher for better answers",
            remedy=f"rename the score; return 1 - {name} for an error rate",
        )
    primary = get_primary_metric(metric, scores)
    if get_score(primary).lower_is_better:
        raise UserError(
            f"lower values of the primary score {primary} are better",
            where=f"metric {metric}",
            expected="a primary score that is higher for better answers",
            remedy=f"return another score first, such as 1 - {primary}",
        )


def compute_metrics(metric: MetricSpec, cases: Sequence[EvalCase]) -> MetricResult:
    """Compute the scores of a task and the share of completions with an end token."""
    assert cases, "no cases to score"
    metric_result = get_task_metric(metric).score_fn(cases)
    eos_fn = mean_metrics([{"ended_with_eos": float(case.ended_with_eos)} for case in cases])
    result = replace(metric_result, estimators=metric_result.estimators | eos_fn)
    if all(case.environment_reward is None for case in cases):
        return result
    return _add_environment_rewards(result, cases)


def _add_environment_rewards(result: MetricResult, cases: Sequence[EvalCase]) -> MetricResult:
    """Return a result with the mean reward of the environment over the episodes that have one."""
    per_sample = []
    rewards = []
    has_reward = []
    for case, scores in zip(cases, result.per_sample, strict=True):
        reward = case.environment_reward
        if reward is not None:
            scores = scores | {ENVIRONMENT_REWARD: reward}
        per_sample.append(scores)
        rewards.append(reward or 0.0)
        has_reward.append(float(reward is not None))
    values_N = np.array(rewards)
    if all(has_reward):
        estimator = estimate_mean(values_N, UNBOUNDED)
    else:
        missing = format_count(has_reward.count(0.0), "episode")
        estimator = replace(
            estimate_ratio(values_N, np.array(has_reward), UNBOUNDED),
            note=f"without {missing} whose environment gave no reward",
        )
    estimators = result.estimators | {ENVIRONMENT_REWARD: estimator}
    return replace(result, per_sample=per_sample, estimators=estimators)


def get_primary_metric(metric: MetricSpec, scores: MetricValues) -> str:
    """Return the name of the primary score; for a custom metric, the first score."""
    component = METRICS.get(metric)
    if component is not None and component.primary_score:
        return component.primary_score
    return next(iter(scores))
