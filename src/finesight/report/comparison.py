"""Comparison of runs and prediction files: metrics, and answers to the same samples.

The first run is the baseline. Each run is compared by its last evaluation.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

from finesight.errors import Step, UserError, suggest_similar_path
from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.eval_case import MetricResult, mean_metrics
from finesight.evaluate.metric_difference import (
    MetricDifference,
    build_unsampled_difference,
    compare_family,
    index_by_sample,
)
from finesight.evaluate.prediction_file import ScoredPrediction, read_predictions
from finesight.evaluate.task_metrics import check_references, compute_metrics
from finesight.evaluate.verdict import Estimators
from finesight.metric_components import METRICS, VALIDATION_LOSS, find_score, get_metric
from finesight.objective_components import DEFAULT_OBJECTIVE
from finesight.report.examples import ExampleSet, build_example_set
from finesight.report.i18n import translate
from finesight.report.metric_rows import (
    MetricCell,
    MetricRow,
    count_samples,
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
        names: set[str] = set()
        for prediction in self.predictions.values():
            names.update(prediction.scores)
        return names

    def get_setting(self, group: str, name: str) -> object:
        """Return a recipe setting of the run, or None if it is not recorded."""
        if self.run_record is None:
            return None
        return as_object(self.run_record.recipe.get(group)).get(name)


def read_compared_runs(paths: Sequence[Path], max_bytes: int | None = None) -> list[ComparedRun]:
    """Read the runs and prediction files of a comparison.

    Args:
        max_bytes: Maximum number of bytes of each file of a run; see `read_run`.

    Raises:
        UserError: There are fewer than two or more than `MAX_RUNS` inputs, an input is duplicated
            or invalid, a run has no evaluation, or references do not fit the metric.
    """
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(
            f"unexpected number of runs: {len(paths)}",
            where="compare",
            expected=f"2 to {MAX_RUNS} runs",
            remedy="Give the directories of the runs.",
        )
    for path, count in Counter(map(Path.resolve, paths)).items():
        if count > 1:
            raise UserError(
                f"{path} is given {count} times",
                where="compare",
                expected="different runs",
                remedy="Give each run only once.",
            )
    names = _find_unique_names(paths)
    runs = []
    for letter, name, path in zip(string.ascii_uppercase, names, paths, strict=False):
        runs.append(_read_compared_run(letter, name, path, max_bytes))
    compared_runs = []
    for run in runs:
        if run.run_record is None:
            run = _infer_metric(run, runs)
        _check_json_references(run)
        compared_runs.append(run)
    return compared_runs


def _check_json_references(run: ComparedRun) -> None:
    """Raise UserError if the metric of a run compares JSON, and a reference is not JSON.

    Other metrics score any reference.
    """
    if get_metric(run.metric).reference_kind != "json" or not run.predictions:
        return
    assert run.metric is not None, f"{run.path} has no metric"
    path = run.path
    if run.run_record is not None:
        path = run.run_record.predictions_files[-1]
    references = []
    ids = []
    for prediction in run.predictions.values():
        references.append((prediction.case.references, prediction.case.reference_boxes))
        ids.append(prediction.case.id)
    try:
        check_references(run.metric, references, ids)
    except UserError as error:
        raise UserError(
            error.what,
            where=str(path),
            expected=f"references that are JSON objects or lists, for the metric {run.metric}",
            remedy="Omit it, or give predictions for samples with JSON answers.",
        ) from error


def _find_unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes that are unique, or else the paths."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        suffixes = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return list(map(str, paths))


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
        example = next(iter(METRICS))
        arguments = {"run_or_model": str(path), "data": "FILE", "metric": example}
        arguments["out"] = "predictions.jsonl"
        raise UserError(
            f"{path} has no evaluation",
            where="compare",
            expected="runs with validation samples (data.eval) and at least one evaluation",
            remedy=Step("eval", arguments, "omit it, or evaluate it and give predictions.jsonl"),
        )
    # Samples are compared by the last prediction file, so figures of the same evaluation.
    last = run_record.evaluations[-1]
    evaluation = as_object((run_record.result or {}).get("after") or last.get("full")) or last
    files = run_record.predictions_files
    predictions = {}
    if files and read_metrics(evaluation):
        predictions = _read_predictions(files[-1], max_bytes)
    metric = as_object(run_record.recipe.get("eval")).get("metric")
    if not isinstance(metric, str):
        metric = None
    return ComparedRun(
        letter,
        name,
        path,
        run_record,
        get_run_status(run_record),
        evaluation,
        metric,
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
    if len(metrics) != 1 or task_metric not in METRICS or not cases:
        return run
    try:
        check_references(task_metric, [(case.references, case.reference_boxes) for case in cases])
    except UserError:
        return run
    per_sample = compute_metrics(task_metric, cases).per_sample
    predictions = {}
    for (key, prediction), scores in zip(run.predictions.items(), per_sample, strict=True):
        record = prediction.record | {"scores": scores}
        predictions[key] = replace(prediction, scores=scores, record=record)
    return replace(run, metric=task_metric, predictions=predictions)


def find_common_samples(
    reference_run: ComparedRun, other_run: ComparedRun
) -> tuple[list[SampleKey], int]:
    """Return the validation samples that two runs answered, and the number of mismatched samples.

    Mismatched samples have equal IDs, but different questions or references.
    """
    same_keys = []
    num_mismatched = 0
    for key, prediction in reference_run.predictions.items():
        other_prediction = other_run.predictions.get(key)
        if other_prediction is None:
            continue
        if _get_question(prediction) == _get_question(other_prediction):
            same_keys.append(key)
        else:
            num_mismatched += 1
    return same_keys, num_mismatched


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
        metric = metrics[0] or translate("unknown")
        other_metric = metrics[1] or translate("unknown")
        texts.append((text, (names[0], metric, names[1], other_metric)))
    elif not common_keys:
        text = "{} and {} have no validation samples in common and are not compared."
        texts.append((text, names))
    elif num_samples != (len(common_keys), len(common_keys)):
        text = "{} and {} are compared on the {:,} samples that both answered, of {:,} and {:,}."
        texts.append((text, (*names, len(common_keys), *num_samples)))
    size_warning = get_metric(metrics[0]).size_warning
    if size_warning and metrics[0] == metrics[1] and num_samples[0] != num_samples[1]:
        texts.append((size_warning, (*names, *num_samples)))
    if num_mismatched:
        text = (
            "{} and {}: {:,} samples of the same ID differ in question or reference answers and are"
            " excluded."
        )
        texts.append((text, (*names, num_mismatched)))
    limit = reference_run.get_setting("eval", "max_new_tokens")
    other_limit = other_run.get_setting("eval", "max_new_tokens")
    if None not in (limit, other_limit) and limit != other_limit:
        text = (
            "{} generated at most {} tokens per answer, {} at most {}. Truncated answers count as"
            " incorrect."
        )
        texts.append((text, (names[0], limit, names[1], other_limit)))
    if reason := explain_loss_mismatch(reference_run, other_run):
        text = "The validation losses of {} and {} are not compared: {}."
        texts.append((text, (*names, translate(reason))))
    return [translate(text, *values) for text, values in texts]


def explain_loss_mismatch(reference_run: ComparedRun, other_run: ComparedRun) -> str:
    """Return the reason why the validation losses of two runs are not comparable.

    Returns an empty string if they are comparable.
    """
    record = reference_run.run_record
    other_record = other_run.run_record
    if record is None or other_record is None:
        return ""
    if _get_data_fingerprint(record) != _get_data_fingerprint(other_record):
        return "the validation data differ"
    objective = reference_run.get_setting("train", "objective") or DEFAULT_OBJECTIVE
    if objective != (other_run.get_setting("train", "objective") or DEFAULT_OBJECTIVE):
        return "the objectives differ"
    if record.manifest.get("family") != other_record.manifest.get("family"):
        return "the model families use different tokenizers"
    if record.manifest.get("system_prompt") != other_record.manifest.get("system_prompt"):
        return "the system prompts differ"
    digest, num_samples = get_sample_set(reference_run.evaluation)
    other_digest, other_num_samples = get_sample_set(other_run.evaluation)
    # Runs of earlier versions have no digest.
    has_other_digest = None not in (digest, other_digest) and digest != other_digest
    if has_other_digest or num_samples != other_num_samples:
        return "they are means over different validation samples"
    return ""


def _get_data_fingerprint(run_record: RunRecord) -> object:
    """Return the fingerprint of the validation data of a run, or None if unknown."""
    fingerprint = get_data_stats(run_record, "eval").get("fingerprint")
    return fingerprint or run_record.checkpoint_identity.get("data.eval")


MISSING_CELL = MetricCell(None, None)

ComputeResultFn = Callable[[ComparedRun, tuple[SampleKey, ...]], MetricResult | None]


def _compute_result(run: ComparedRun, keys: tuple[SampleKey, ...]) -> MetricResult | None:
    """Return the metric result of a run on the given samples.

    Task metrics are computed again. Custom metrics are not executed: the result is the mean of
    recorded scores, or None if the predictions have different score names.
    """
    predictions = [run.predictions[key] for key in keys]
    if run.metric is not None and run.metric in METRICS and predictions:
        return compute_metrics(run.metric, [prediction.case for prediction in predictions])
    per_sample = [prediction.scores for prediction in predictions]
    if len(set(map(frozenset, per_sample))) != 1:
        return None
    bounds = {}
    for name in per_sample[0]:
        is_bounded = run.metric is None and _is_bounded(name)
        if not is_bounded or max(scores[name] for scores in per_sample) > 1:
            bounds[name] = UNBOUNDED
    return MetricResult(per_sample, mean_metrics(per_sample, bounds=bounds))


def _is_bounded(name: str) -> bool:
    """Return whether a score has a known range of 0 to 1."""
    score = find_score(name)
    return score is not None and not score.lower_is_better and score.maximum == 1


def compare_metrics(runs: Sequence[ComparedRun]) -> list[MetricRow]:
    """Compare all metrics of all runs. The primary metric is first, the validation loss last."""
    # The baseline is compared with several runs on the same samples.
    compute_result = cache(_compute_result)
    cells_by_run = [_collect_cells(run, compute_result) for run in runs]
    primary_metrics = [str(run.evaluation.get("primary_metric") or "") for run in runs]
    primary_metric = next(filter(None, primary_metrics), "")
    recorded = dict.fromkeys(chain.from_iterable(cells_by_run))
    names = sorted(recorded, key=lambda name: (name == VALIDATION_LOSS, name != primary_metric))
    differences_by_run = _compute_differences(runs, compute_result, primary_metric)
    for run, cells, differences in zip(runs[1:], cells_by_run[1:], differences_by_run, strict=True):
        keys, _ = find_common_samples(runs[0], run)
        num_common = 0
        if any(len(one.predictions) != len(keys) for one in (runs[0], run)):
            num_common = len(keys)
        for name, difference in differences.items():
            cell = replace(cells.get(name, MISSING_CELL), difference=difference)
            if name != VALIDATION_LOSS:
                cell = replace(cell, num_common=num_common)
            cells[name] = cell
    rows = []
    for name in names:
        row_cells = [cells.get(name, MISSING_CELL) for cells in cells_by_run]
        rows.append(MetricRow(name, name == primary_metric, row_cells))
    return rows


def _collect_cells(run: ComparedRun, compute_result: ComputeResultFn) -> dict[str, MetricCell]:
    """Return the recorded metrics of a run, or compute those of a prediction file."""
    cells: dict[str, MetricCell] = {}
    if run.run_record is not None:
        line = run.evaluation
        for name, value in read_metrics(line).items():
            note = get_note(line, name)
            num_samples = count_samples(line, name)
            interval = read_interval(line, name)
            cells[name] = MetricCell(value, interval, note=note, num_samples=num_samples)
        return cells
    metric_result = compute_result(run, tuple(run.predictions))
    if metric_result is None:
        return {}
    intervals = metric_result.intervals()
    notes = metric_result.notes()
    for name, value in metric_result.scores.items():
        interval = parse_interval(intervals[name])
        note = notes.get(name, "")
        num_samples = len(run.predictions)
        cells[name] = MetricCell(value, interval, note=note, num_samples=num_samples)
    return cells


def _compute_differences(
    runs: Sequence[ComparedRun], compute_result: ComputeResultFn, primary_metric: str
) -> list[dict[str, MetricDifference]]:
    """Return the differences of each further run from the baseline, which are one family."""
    reference_run, *other_runs = runs
    pairs: list[tuple[Estimators, Estimators]] = []
    for run in other_runs:
        keys, _ = find_common_samples(reference_run, run)
        before = None
        after = None
        if reference_run.metric == run.metric and keys:
            before = compute_result(reference_run, tuple(keys))
            after = compute_result(run, tuple(keys))
        if before is None or after is None:
            pairs.append(({}, {}))
        else:
            pairs.append((before.estimators, after.estimators))
    before_loss = read_metrics(reference_run.evaluation).get(VALIDATION_LOSS)
    differences_by_run = []
    for run, compared in zip(other_runs, compare_family(pairs, primary_metric), strict=True):
        differences = {one.name: one for one in compared}
        after_loss = read_metrics(run.evaluation).get(VALIDATION_LOSS)
        differences_by_run.append(differences)
        if before_loss is None or after_loss is None:
            continue
        if not explain_loss_mismatch(reference_run, run):
            differences[VALIDATION_LOSS] = build_unsampled_difference(
                VALIDATION_LOSS, before_loss, after_loss
            )
    return differences_by_run


MAX_SAMPLES = 600
"""Maximum number of samples on a comparison page.

With eight runs, their answers take a few megabytes.
"""


def compare_samples(runs: Sequence[ComparedRun], max_samples: int = MAX_SAMPLES) -> ExampleSet:
    """Compare the validation samples that the baseline and another run answered.

    Samples with different scores are selected first. If all scores are equal, samples are `right`
    (the maximum) or `wrong`.
    """
    reference_run, *other_runs = runs
    # Runs may have answered different samples, or different questions with the same ID.
    common_keys: list[set[SampleKey]] = []
    for run in other_runs:
        same_keys, _ = find_common_samples(reference_run, run)
        common_keys.append(set(same_keys))
    lines_by_sample: list[list[JsonObject | None]] = []
    for key, prediction in reference_run.predictions.items():
        if not any(key in keys for keys in common_keys):
            continue
        lines: list[JsonObject | None] = [prediction.record]
        for run, keys in zip(other_runs, common_keys, strict=True):
            lines.append(run.predictions[key].record if key in keys else None)
        lines_by_sample.append(lines)
    primary_metric = reference_run.evaluation.get("primary_metric")
    if not isinstance(primary_metric, str):
        primary_metric = None
    return build_example_set(
        lines_by_sample,
        primary_metric,
        {"differ": max_samples // 2, "wrong": max_samples // 4, "right": max_samples // 4},
        max_samples,
    )
