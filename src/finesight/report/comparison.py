"""Comparison of runs and prediction files: metrics, and answers to the same samples.

The first run is the baseline. Each run is compared by its last evaluation.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from finesight.errors import Step, UserError, suggest_similar_path
from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.eval_case import MetricResult, mean_metrics
from finesight.evaluate.metric_difference import (
    MetricDifference,
    build_unsampled_difference,
    compare_estimators,
    index_by_sample,
)
from finesight.evaluate.prediction_file import ScoredPrediction, read_predictions
from finesight.evaluate.task_metrics import (
    LOWER_IS_BETTER,
    METRIC_TEXTS,
    TASK_METRICS,
    VALIDATION_LOSS,
    check_references,
    compute_metrics,
)
from finesight.report.examples import MAX_SCORES, ExampleSet, build_example_set
from finesight.report.i18n import translate
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    get_note,
    parse_interval,
    read_interval,
    read_metrics,
)
from finesight.report.run_reader import JsonObject, RunRecord, as_object, get_sample_set, read_run
from finesight.report.summary import RunStatus, get_data_stats, get_run_status

MAX_RUNS = 8
"""Maximum number of compared runs, since a page has limited columns and colors."""

SampleKey = tuple[str, int]
"""Key of a validation sample: its ID, and the number of earlier duplicates.

IDs need not be unique.
"""


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """Input of a comparison: a run or a prediction file.

    Attributes:
        name: Shortest path suffix that is unique among the inputs.
        run_record: Content of the run directory. None for a prediction file.
        status: Status of the run. None for a prediction file.
        evaluation: Evaluation of the final weights, or the last one. Empty for a prediction file.
        metric: Task metric. None if unknown.
    """

    letter: str
    name: str
    path: Path
    run_record: RunRecord | None
    status: RunStatus | None
    evaluation: JsonObject
    metric: str | None
    predictions: dict[SampleKey, ScoredPrediction]

    @property
    def label(self) -> str:
        """Display name of the run: its letter and its name."""
        return f"{self.letter} {self.name}"

    @property
    def score_names(self) -> set[str]:
        """Names of the per-sample scores."""
        return {name for prediction in self.predictions.values() for name in prediction.scores}

    def get_setting(self, group: str, name: str) -> object:
        """Return a recipe setting of the run, or None if it is not recorded."""
        recipe = self.run_record.recipe if self.run_record else {}
        return as_object(recipe.get(group)).get(name)


def read_compared_runs(paths: Sequence[Path], max_bytes: int | None = None) -> list[ComparedRun]:
    """Read the runs and prediction files of a comparison.

    Args:
        max_bytes: Maximum number of bytes of each file of a run; see `read_run`.

    Raises:
        UserError: There are fewer than two or more than `MAX_RUNS` inputs, an input is duplicated
            or invalid, or a run has no evaluation.
    """
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(
            f"unexpected number of runs: {len(paths)}",
            where="compare",
            expected=f"2 to {MAX_RUNS} runs",
            remedy="Give the directories of the runs.",
        )
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            what, remedy = f"{path} is given {count} times", "Give each run only once."
            raise UserError(what, where="compare", expected="different runs", remedy=remedy)
    # The shortest path suffixes that are unique.
    parts = [path.resolve().parts for path in paths]
    names = [str(path) for path in paths]
    for count in range(1, max(map(len, parts))):
        suffixes = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(suffixes)) == len(suffixes):
            names = suffixes
            break
    inputs = zip(string.ascii_uppercase, names, paths, strict=False)
    runs = [_read_compared_run(*arguments, max_bytes) for arguments in inputs]
    return [run if run.run_record else _infer_metric(run, runs) for run in runs]


def _read_compared_run(letter: str, name: str, path: Path, max_bytes: int | None) -> ComparedRun:
    if path.is_file():
        predictions = _read_predictions(path)
        return ComparedRun(letter, name, path, None, None, {}, None, predictions)
    if not path.exists():
        raise UserError(
            f"no such file or directory: {path}",
            where="compare",
            expected="a run directory, or a file of answers with scores",
            remedy=suggest_similar_path(path),
        )
    run_record = read_run(path, "compare", max_bytes=max_bytes)
    if not run_record.evaluations:
        arguments = {"run_or_model": str(path), "data": "FILE", "metric": "captions"}
        arguments["out"] = "predictions.jsonl"
        raise UserError(
            f"{path} has no evaluation",
            where="compare",
            expected="runs with validation samples (data.eval) and at least one evaluation",
            remedy=Step("eval", arguments, "omit it, or evaluate it and give predictions.jsonl"),
        )
    # The figures of the last prediction file.
    last = run_record.evaluations[-1]
    evaluation = as_object((run_record.result or {}).get("after") or last.get("full")) or last
    files = run_record.predictions_files
    has_predictions = bool(files) and bool(read_metrics(evaluation))
    predictions = _read_predictions(files[-1], max_bytes) if has_predictions else {}
    metric = as_object(run_record.recipe.get("eval")).get("metric")
    return ComparedRun(
        letter,
        name,
        path,
        run_record,
        get_run_status(run_record),
        evaluation,
        metric if isinstance(metric, str) else None,
        predictions,
    )


def _read_predictions(
    path: Path, max_bytes: int | None = None
) -> dict[SampleKey, ScoredPrediction]:
    return index_by_sample(read_predictions(path, max_bytes), lambda prediction: prediction.case.id)


def _infer_metric(run: ComparedRun, runs: Sequence[ComparedRun]) -> ComparedRun:
    """Set the task metric of a prediction file, which does not record it.

    It is the metric of a run whose predictions have the same score names. Otherwise, the scores of
    the metric of all runs are computed if the file contains the references.
    """
    metrics = {other_run.metric: other_run for other_run in runs if other_run.metric is not None}
    for metric, other_run in metrics.items():
        if other_run.score_names == run.score_names:
            return replace(run, metric=metric)
    task_metric = next(iter(metrics), "")
    cases = [prediction.case for prediction in run.predictions.values()]
    if len(metrics) != 1 or task_metric not in TASK_METRICS or not cases:
        return run
    try:
        check_references(task_metric, [(case.references, case.reference_boxes) for case in cases])
    except UserError:
        return run
    per_sample = compute_metrics(task_metric, cases).per_sample
    predictions = {
        key: replace(prediction, scores=scores, record=prediction.record | {"scores": scores})
        for (key, prediction), scores in zip(run.predictions.items(), per_sample, strict=True)
    }
    return replace(run, metric=task_metric, predictions=predictions)


def find_common_samples(
    reference_run: ComparedRun, other_run: ComparedRun
) -> tuple[list[SampleKey], int]:
    """Return the validation samples that two runs answered, and the number of mismatched samples.

    Mismatched samples have equal IDs, but different questions or references.
    """
    common_keys = [key for key in reference_run.predictions if key in other_run.predictions]
    same_keys = [
        key
        for key in common_keys
        if _get_question(reference_run.predictions[key])
        == _get_question(other_run.predictions[key])
    ]
    return same_keys, len(common_keys) - len(same_keys)


def _get_question(prediction: ScoredPrediction) -> tuple[object, ...]:
    case = prediction.case
    return prediction.record.get("prompt"), case.references, case.reference_boxes


def list_warnings(reference_run: ComparedRun, other_run: ComparedRun) -> list[str]:
    """Return warnings about differences that limit the comparison of two runs."""
    common_keys, num_mismatched = find_common_samples(reference_run, other_run)
    names = reference_run.label, other_run.label
    metrics = reference_run.metric, other_run.metric
    num_samples = len(reference_run.predictions), len(other_run.predictions)
    texts: list[tuple[str, tuple[object, ...]]] = []
    if metrics[0] != metrics[1]:
        text = "{} uses the metric {}, {} uses {}: their scores are not compared."
        shown = [metric or translate("unknown") for metric in metrics]
        texts.append((text, (names[0], shown[0], names[1], shown[1])))
    elif not common_keys:
        text = "{} and {} have no validation samples in common and are not compared."
        texts.append((text, names))
    elif num_samples != (len(common_keys), len(common_keys)):
        text = "{} and {} are compared on the {:,} samples that both answered, of {:,} and {:,}."
        texts.append((text, (*names, len(common_keys), *num_samples)))
    if metrics == ("detection", "detection") and num_samples[0] != num_samples[1]:
        text = (
            "Average precision decreases with the size of a dataset. {} and {} answered {:,} and"
            " {:,} samples, so their AP values are not comparable. The differences use the samples"
            " that both answered."
        )
        texts.append((text, (*names, *num_samples)))
    if num_mismatched:
        text = (
            "{} and {}: {:,} samples of the same ID differ in question or reference answers and are"
            " excluded."
        )
        texts.append((text, (*names, num_mismatched)))
    limits = [run.get_setting("eval", "max_new_tokens") for run in (reference_run, other_run)]
    if None not in limits and limits[0] != limits[1]:
        text = (
            "{} generated at most {} tokens per answer, {} at most {}. Truncated answers count as"
            " incorrect."
        )
        texts.append((text, (names[0], limits[0], names[1], limits[1])))
    if reason := explain_loss_mismatch(reference_run, other_run):
        text = "The validation losses of {} and {} are not compared: {}."
        texts.append((text, (*names, translate(reason))))
    return [translate(text, *values) for text, values in texts]


def explain_loss_mismatch(reference_run: ComparedRun, other_run: ComparedRun) -> str:
    """Return the reason why the validation losses of two runs are not comparable.

    Returns an empty string if they are comparable.
    """
    reference_record, other_record = reference_run.run_record, other_run.run_record
    if reference_record is None or other_record is None:
        return ""
    fingerprints = [
        get_data_stats(record, "eval").get("fingerprint")
        or record.checkpoint_identity.get("data.eval")
        for record in (reference_record, other_record)
    ]
    if fingerprints[0] != fingerprints[1]:
        return "the validation data differ"
    objectives = [run.get_setting("train", "objective") for run in (reference_run, other_run)]
    if len({one or "sft" for one in objectives}) > 1:
        return "the objectives differ"
    if reference_record.manifest.get("family") != other_record.manifest.get("family"):
        return "the model families use different tokenizers"
    if reference_record.manifest.get("system_prompt") != other_record.manifest.get("system_prompt"):
        return "the system prompts differ"
    sample_sets = [get_sample_set(run.evaluation) for run in (reference_run, other_run)]
    digests, counts = map(set, zip(*sample_sets, strict=True))
    if len(digests - {None}) > 1 or len(counts) > 1:
        return "they are means over different validation samples"
    return ""


MISSING_CELL = MetricCell(None, None)

ComputeResultFn = Callable[[ComparedRun, tuple[SampleKey, ...]], MetricResult | None]


def _compute_result(run: ComparedRun, keys: tuple[SampleKey, ...]) -> MetricResult | None:
    """Return the metric result of a run on the given samples.

    Task metrics are computed again. Custom metrics are not executed: the result is the mean of
    recorded scores, or None if the predictions have different score names.
    """
    predictions = [run.predictions[key] for key in keys]
    if run.metric is not None and run.metric in TASK_METRICS and predictions:
        return compute_metrics(run.metric, [prediction.case for prediction in predictions])
    if len({frozenset(prediction.scores) for prediction in predictions}) != 1:
        return None
    per_sample = [prediction.scores for prediction in predictions]
    known = {*METRIC_TEXTS} - {*LOWER_IS_BETTER, *MAX_SCORES} if run.metric is None else set()
    bounds = {
        name: UNBOUNDED
        for name in per_sample[0]
        if name not in known or max(s[name] for s in per_sample) > 1
    }
    return MetricResult(per_sample, mean_metrics(per_sample, bounds=bounds))


def compare_metrics(runs: Sequence[ComparedRun]) -> list[MetricRow]:
    """Compare all metrics of all runs. The primary metric is first, the validation loss last."""
    # The baseline is compared with several runs on the same samples.
    compute_result = cache(_compute_result)
    cells_by_run = [_collect_cells(run, compute_result) for run in runs]
    names = {name for cells in cells_by_run for name in cells}
    primary_metrics = [str(run.evaluation.get("primary_metric") or "") for run in runs]
    primary_metric = next(filter(None, primary_metrics), "")
    order = dict.fromkeys([primary_metric, *(name for cells in cells_by_run for name in cells)])
    for run, cells in zip(runs[1:], cells_by_run[1:], strict=True):
        keys, _ = find_common_samples(runs[0], run)
        num_common = len(keys) * any(len(one.predictions) != len(keys) for one in (runs[0], run))
        for name, difference in _compute_differences(runs[0], run, compute_result).items():
            cell = replace(cells.get(name, MISSING_CELL), difference=difference)
            cells[name] = cell if name == VALIDATION_LOSS else replace(cell, num_common=num_common)
    return [
        MetricRow(
            name, name == primary_metric, [cells.get(name, MISSING_CELL) for cells in cells_by_run]
        )
        for name in (*(name for name in order if name != VALIDATION_LOSS), VALIDATION_LOSS)
        if name in names
    ]


def _collect_cells(run: ComparedRun, compute_result: ComputeResultFn) -> dict[str, MetricCell]:
    """Return the recorded metrics of a run, or compute those of a prediction file."""
    if run.run_record is not None:
        line = run.evaluation
        return {
            name: MetricCell(value, read_interval(line, name), note=get_note(line, name))
            for name, value in read_metrics(line).items()
        }
    metric_result = compute_result(run, tuple(run.predictions))
    if metric_result is None:
        return {}
    intervals, notes = metric_result.intervals(), metric_result.notes()
    return {
        name: MetricCell(value, parse_interval(intervals[name]), note=notes.get(name, ""))
        for name, value in metric_result.scores.items()
    }


def _compute_differences(
    reference_run: ComparedRun, other_run: ComparedRun, compute_result: ComputeResultFn
) -> dict[str, MetricDifference]:
    differences: dict[str, MetricDifference] = {}
    pair = reference_run, other_run
    keys, _ = find_common_samples(*pair)
    if reference_run.metric == other_run.metric and keys:
        before, after = (compute_result(run, tuple(keys)) for run in pair)
        if before is not None and after is not None:
            differences = {
                one.name: one for one in compare_estimators(before.estimators, after.estimators)
            }
    before_loss, after_loss = (read_metrics(run.evaluation).get(VALIDATION_LOSS) for run in pair)
    if before_loss is not None and after_loss is not None and not explain_loss_mismatch(*pair):
        differences[VALIDATION_LOSS] = build_unsampled_difference(
            VALIDATION_LOSS, before_loss, after_loss
        )
    return differences


MAX_SAMPLES = 600
"""Maximum number of samples on a comparison page.

With eight runs, their answers take a few megabytes.
"""


def compare_samples(runs: Sequence[ComparedRun], max_samples: int = MAX_SAMPLES) -> ExampleSet:
    """Compare the validation samples that the baseline and another run answered.

    Samples with different scores are selected first. If all scores are equal, samples are `right`
    (the maximum) or `wrong`.
    """
    reference_run = runs[0]
    common_keys = [
        set(reference_run.predictions),
        *(set(find_common_samples(reference_run, other_run)[0]) for other_run in runs[1:]),
    ]
    lines_by_sample = [
        [
            run.predictions[key].record if key in run_keys else None
            for run, run_keys in zip(runs, common_keys, strict=True)
        ]
        for key in reference_run.predictions
        if any(key in run_keys for run_keys in common_keys[1:])
    ]
    primary_metric = reference_run.evaluation.get("primary_metric")
    return build_example_set(
        lines_by_sample,
        primary_metric if isinstance(primary_metric, str) else None,
        {"differ": max_samples // 2, "wrong": max_samples // 4, "right": max_samples // 4},
        max_samples,
    )
