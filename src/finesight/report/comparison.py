"""Comparison of runs and prediction files: metrics, and answers to the same samples.

The first run is the baseline. Each run is compared by its last evaluation.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finesight.errors import UserError, suggest_similar_path
from finesight.evaluate import custom_metric
from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics
from finesight.evaluate.metric_difference import (
    MetricDifference,
    ScoredPrediction,
    build_unsampled_difference,
    compare_results,
    index_by_sample,
    read_predictions,
)
from finesight.evaluate.task_metrics import LOWER_IS_BETTER, TASK_METRICS, compute_metrics
from finesight.report.examples import (
    MAX_SCORES,
    MIN_SCORE_CHANGE,
    ExampleDataBuilder,
    JsonData,
    read_scores,
    select_sample_metric,
)
from finesight.report.html import FormulaConverter
from finesight.report.i18n import translate
from finesight.report.metrics import (
    VALIDATION_LOSS,
    IntervalBounds,
    MetricChange,
    get_note,
    parse_interval,
    read_interval,
    read_metrics,
)
from finesight.report.run_reader import JsonObject, RunRecord, read_run
from finesight.report.summary import RunStatus, get_data_stats, get_run_status

COMMAND = "finesight compare"

MAX_RUNS = 8
"""Maximum number of compared runs, since a page has limited columns and colors."""

SampleKey = tuple[str, int]
"""Key of a validation sample: its ID, and the number of earlier duplicates.

IDs need not be unique.
"""


@dataclass(frozen=True)
class ComparedRun:
    """Input of a comparison: a run or a prediction file.

    Attributes:
        letter: Letter that identifies the run on the page.
        name: Shortest path suffix that is unique among the inputs.
        path: Run directory or prediction file.
        run_record: Content of the run directory. None for a prediction file.
        status: Status of the run. None for a prediction file.
        evaluation: Evaluation of the final weights, or the last one. Empty for a prediction file.
        metric: Task metric. None if unknown.
        predictions: Predictions of the evaluation by sample.
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

    def get_setting(self, group: str, name: str) -> object:
        """Return a recipe setting of the run, or None if it is not recorded."""
        settings: Any = self.run_record.recipe.get(group) if self.run_record else None
        return settings.get(name) if isinstance(settings, dict) else None


def read_compared_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs and prediction files of a comparison.

    Raises:
        UserError: There are fewer than two or more than `MAX_RUNS` inputs, an input is duplicated
            or invalid, or a run has no evaluation.
    """
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(
            f"unexpected number of runs: {len(paths)}",
            where=COMMAND,
            expected=f"2 to {MAX_RUNS} runs",
            remedy="Give the directories of the runs.",
        )
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(
                f"{path} is given {count} times",
                where=COMMAND,
                expected="different runs",
                remedy="Give each run only once.",
            )
    runs = [
        _read_compared_run(*arguments)
        for arguments in zip(
            string.ascii_uppercase, _shortest_unique_names(paths), paths, strict=False
        )
    ]
    return [_infer_metric(run, runs) for run in runs]


def _shortest_unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest suffix of each path that distinguishes it from the others."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        suffixes = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return [str(path) for path in paths]


def _read_compared_run(letter: str, name: str, path: Path) -> ComparedRun:
    if path.is_file():
        return ComparedRun(
            letter, name, path, None, None, {}, None, _index_by_sample(read_predictions(path))
        )
    if not path.exists():
        raise UserError(
            f"no such file or directory: {path}",
            where=COMMAND,
            expected="a run directory, or a file of `finesight eval --out`",
            remedy=suggest_similar_path(path),
        )
    run_record = read_run(path, COMMAND)
    if not run_record.evaluations:
        raise UserError(
            f"{path} has no evaluation",
            where=COMMAND,
            expected="runs with validation samples (data.eval) and at least one evaluation",
            remedy=f"Omit it, or evaluate it with finesight eval {path} --data FILE --metric NAME"
            " --out predictions.jsonl and give predictions.jsonl instead.",
        )
    final_evaluation = (run_record.result or {}).get("after")
    evaluation = (
        final_evaluation if isinstance(final_evaluation, dict) else run_record.evaluations[-1]
    )
    predictions_files = run_record.predictions_files
    predictions = (
        _index_by_sample(read_predictions(predictions_files[-1]))
        if predictions_files and read_metrics(evaluation)
        else {}
    )
    settings = run_record.recipe.get("eval")
    metric = settings.get("metric") if isinstance(settings, dict) else None
    metric_name = metric if isinstance(metric, str) else None
    return ComparedRun(
        letter,
        name,
        path,
        run_record,
        get_run_status(run_record),
        evaluation,
        metric_name,
        predictions,
    )


def _infer_metric(run: ComparedRun, runs: Sequence[ComparedRun]) -> ComparedRun:
    """Set the task metric of a prediction file.

    The file does not record it. It is the metric of a run whose predictions have the same score
    names.
    """
    names = {name for prediction in run.predictions.values() for name in prediction.scores}
    for other_run in runs:
        other_names = {
            name for prediction in other_run.predictions.values() for name in prediction.scores
        }
        if run.run_record is None and other_run.metric is not None and other_names == names:
            return replace(run, metric=other_run.metric)
    return run


def _index_by_sample(predictions: Sequence[ScoredPrediction]) -> dict[SampleKey, ScoredPrediction]:
    return index_by_sample(predictions, lambda prediction: prediction.case.id)


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
    case: EvalCase = prediction.case
    return prediction.record.get("prompt"), case.references, case.reference_boxes


def is_custom_metric(metric: str | None) -> bool:
    """Return whether a metric is unknown or a user-defined program.

    Reports never execute such programs.
    """
    return (
        metric is None
        or custom_metric.parse_metric_path(metric) is not None
        or metric not in TASK_METRICS
    )


def list_warnings(reference_run: ComparedRun, other_run: ComparedRun) -> list[str]:
    """Return warnings about differences that limit the comparison of two runs."""
    warnings = []
    common_keys, num_mismatched = find_common_samples(reference_run, other_run)
    names = reference_run.label, other_run.label
    if reference_run.metric != other_run.metric:
        metrics = (
            reference_run.metric or translate("unknown"),
            other_run.metric or translate("unknown"),
        )
        text = "{} uses the metric {}, {} uses {}: their scores are not compared."
        warnings.append(translate(text, names[0], metrics[0], names[1], metrics[1]))
    elif not common_keys:
        warnings.append(
            translate(
                "{} and {} have no validation samples in common and are not compared.", *names
            )
        )
    elif (counts := (len(reference_run.predictions), len(other_run.predictions))) != (
        len(common_keys),
        len(common_keys),
    ):
        text = "{} and {} are compared on the {:,} samples that both answered, of {:,} and {:,}."
        warnings.append(translate(text, *names, len(common_keys), *counts))
    if reference_run.metric == other_run.metric == "detection" and len(
        reference_run.predictions
    ) != len(other_run.predictions):
        text = (
            "Average precision decreases with the size of a dataset. {} and {} answered {:,} and"
            " {:,} samples, so their AP values are not comparable. The differences use the samples"
            " that both answered."
        )
        warnings.append(
            translate(text, *names, len(reference_run.predictions), len(other_run.predictions))
        )
    if num_mismatched:
        text = (
            "{} and {}: {:,} samples of the same ID differ in question or reference answers and are"
            " excluded."
        )
        warnings.append(translate(text, *names, num_mismatched))
    max_new_tokens = [
        run.get_setting("eval", "max_new_tokens") for run in (reference_run, other_run)
    ]
    if None not in max_new_tokens and max_new_tokens[0] != max_new_tokens[1]:
        text = (
            "{} generated at most {} tokens per answer, {} at most {}. Truncated answers count as"
            " incorrect."
        )
        warnings.append(translate(text, names[0], max_new_tokens[0], names[1], max_new_tokens[1]))
    if reason := explain_loss_mismatch(reference_run, other_run):
        text = "The validation losses of {} and {} are not compared: {}."
        warnings.append(translate(text, *names, translate(reason)))
    return warnings


def explain_loss_mismatch(reference_run: ComparedRun, other_run: ComparedRun) -> str:
    """Return the reason why the validation losses of two runs are not comparable.

    Returns an empty string if they are comparable.
    """
    reference_record, other_record = reference_run.run_record, other_run.run_record
    if reference_record is None or other_record is None:
        return ""
    fingerprints = [_get_eval_fingerprint(record) for record in (reference_record, other_record)]
    if fingerprints[0] != fingerprints[1]:
        return "the validation data differ"
    if reference_record.manifest.get("family") != other_record.manifest.get("family"):
        return "the model families use different tokenizers"
    if reference_record.manifest.get("system_prompt") != other_record.manifest.get("system_prompt"):
        return "the system prompts differ"
    return ""


def _get_eval_fingerprint(run_record: RunRecord) -> object:
    return get_data_stats(run_record, "eval").get(
        "fingerprint"
    ) or run_record.checkpoint_identity.get("data.eval")


@dataclass(frozen=True)
class MetricCell(MetricChange):
    """Metric of a run in the comparison table.

    Attributes:
        value: Value of the metric. None if the run does not have it.
        interval: 95 % confidence interval.
        difference: Difference from the baseline. None for the baseline, or if not comparable.
        note: Reason of a missing interval, or a warning.
    """

    value: float | None
    interval: IntervalBounds | None
    difference: MetricDifference | None
    note: str = ""

    @property
    def change(self) -> float | None:
        """Value of the run minus value of the baseline, on common samples. None if unknown."""
        return None if self.difference is None else self.difference.after - self.difference.before


@dataclass(frozen=True)
class MetricComparisonRow:
    """Row of the comparison table: one metric of all runs."""

    name: str
    is_primary: bool
    cells: list[MetricCell]

    @property
    def lower_is_better(self) -> bool:
        """True if lower values of the metric are better."""
        return self.name in LOWER_IS_BETTER


class MetricResultCache:
    """Cache of metric results by run and subset of samples."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, tuple[SampleKey, ...]], MetricResult] = {}

    def get_result(self, run: ComparedRun, keys: Sequence[SampleKey]) -> MetricResult | None:
        """Return the metric result of a run on the given samples.

        Built-in metrics are computed again. Custom metrics are not executed: the result is the mean
        of recorded scores, or None if the predictions have different score names.
        """
        cache_key = run.letter, tuple(keys)
        predictions = [run.predictions[key] for key in keys]
        if cache_key not in self._results and predictions:
            task = next((task for task in TASK_METRICS if task == run.metric), None)
            if task is not None and not is_custom_metric(run.metric):
                self._results[cache_key] = compute_metrics(
                    task, [prediction.case for prediction in predictions]
                )
            elif len({frozenset(prediction.scores) for prediction in predictions}) == 1:
                per_sample = [prediction.scores for prediction in predictions]
                self._results[cache_key] = MetricResult(
                    per_sample, mean_metrics(per_sample, bounds=UNBOUNDED)
                )
        return self._results.get(cache_key)


def compare_metrics(runs: Sequence[ComparedRun]) -> list[MetricComparisonRow]:
    """Compare all metrics of all runs. The primary metric is first, the validation loss last."""
    result_cache = MetricResultCache()
    metrics_by_run = [_collect_metrics(run, result_cache) for run in runs]
    differences_by_run = [
        {},
        *(_compute_differences(runs[0], other_run, result_cache) for other_run in runs[1:]),
    ]
    primary_metrics = [str(run.evaluation.get("primary_metric") or "") for run in runs]
    primary_metric = next(filter(None, primary_metrics), "")
    names = dict.fromkeys(
        [primary_metric, *(name for metrics in metrics_by_run for name in metrics)]
    )
    order = [name for name in names if name and name != VALIDATION_LOSS]
    return [
        MetricComparisonRow(
            name,
            name == primary_metric,
            [
                _build_cell(metrics.get(name), differences.get(name))
                for metrics, differences in zip(metrics_by_run, differences_by_run, strict=True)
            ],
        )
        for name in (*order, VALIDATION_LOSS)
        if any(name in metrics for metrics in metrics_by_run)
    ]


class _RunMetric(NamedTuple):
    """Metric value of a run. The note explains a missing interval or is a warning."""

    value: float
    interval: IntervalBounds | None
    note: str


def _build_cell(metric: _RunMetric | None, difference: MetricDifference | None) -> MetricCell:
    value, interval, note = metric or (None, None, "")
    return MetricCell(value, interval, difference, note)


def _collect_metrics(run: ComparedRun, result_cache: MetricResultCache) -> dict[str, _RunMetric]:
    """Return the recorded metrics of a run, or compute those of a prediction file."""
    if run.run_record is not None:
        metrics = read_metrics(run.evaluation)
        return {
            name: _RunMetric(
                value, read_interval(run.evaluation, name), get_note(run.evaluation, name)
            )
            for name, value in metrics.items()
        }
    metric_result = result_cache.get_result(run, list(run.predictions))
    if metric_result is None:
        return {}
    intervals, notes = metric_result.intervals(), metric_result.notes()
    return {
        name: _RunMetric(value, parse_interval(intervals[name]), notes.get(name, ""))
        for name, value in metric_result.scores.items()
    }


def _compute_differences(
    reference_run: ComparedRun, other_run: ComparedRun, result_cache: MetricResultCache
) -> dict[str, MetricDifference]:
    differences: dict[str, MetricDifference] = {}
    keys, _ = find_common_samples(reference_run, other_run)
    if reference_run.metric == other_run.metric and keys:
        before, after = (result_cache.get_result(run, keys) for run in (reference_run, other_run))
        if before is not None and after is not None:
            differences = {
                difference.name: difference for difference in compare_results(before, after)
            }
    losses = [
        read_metrics(run.evaluation).get(VALIDATION_LOSS) for run in (reference_run, other_run)
    ]
    if (
        losses[0] is not None
        and losses[1] is not None
        and not explain_loss_mismatch(reference_run, other_run)
    ):
        differences[VALIDATION_LOSS] = build_unsampled_difference(
            VALIDATION_LOSS, losses[0], losses[1]
        )
    return differences


AgreementKind = Literal["differ", "wrong", "right"]
AGREEMENT_KINDS: tuple[AgreementKind, ...] = ("differ", "wrong", "right")
"""Classes of compared samples by score, in the order in which samples are selected.

- `differ`: the runs have different scores.
- `wrong`: all scores are equal and below the maximum.
- `right`: all scores are the maximum.
"""

MAX_SAMPLES = 600
"""Maximum number of samples on a comparison page.

With eight runs, their answers take a few megabytes.
"""


@dataclass(frozen=True)
class ComparedSample:
    """Validation sample with the predictions of all runs.

    Attributes:
        lines: Prediction of each run. None if missing.
        scores: Compared score of each prediction. None if unknown.
        kind: Class by score, see `AGREEMENT_KINDS`.
        score_range: Difference between the highest and the lowest score.
    """

    lines: list[JsonObject | None]
    scores: list[float | None]
    kind: AgreementKind
    score_range: float

    @property
    def question_line(self) -> JsonObject:
        """Any prediction of the sample, since all contain the same question."""
        return next(line for line in self.lines if line is not None)


@dataclass(frozen=True)
class ComparedSamples:
    """Validation samples of a comparison page.

    Attributes:
        displayed: Samples on the page, largest differences first.
        counts: Number of samples by class, including those that are not displayed.
        metric: Name of the compared per-sample score.
        max_score: Maximum of this score.
    """

    displayed: list[ComparedSample]
    counts: dict[AgreementKind, int]
    metric: str
    max_score: float

    @property
    def total(self) -> int:
        """Number of samples, including those that are not displayed."""
        return sum(self.counts.values())


def compare_samples(runs: Sequence[ComparedRun], max_samples: int = MAX_SAMPLES) -> ComparedSamples:
    """Compare the validation samples that the baseline and another run answered.

    Args:
        runs: Compared runs, the baseline first.
        max_samples: Maximum number of displayed samples.
    """
    reference_run = runs[0]
    common_keys = [
        set(reference_run.predictions),
        *(set(find_common_samples(reference_run, other_run)[0]) for other_run in runs[1:]),
    ]
    sample_keys = [
        key
        for key in reference_run.predictions
        if any(key in run_keys for run_keys in common_keys[1:])
    ]
    lines_by_sample = [
        [
            run.predictions[key].record if key in run_keys else None
            for run, run_keys in zip(runs, common_keys, strict=True)
        ]
        for key in sample_keys
    ]
    primary_metric = reference_run.evaluation.get("primary_metric")
    metric = select_sample_metric(
        primary_metric if isinstance(primary_metric, str) else None,
        [line for lines in lines_by_sample for line in lines if line is not None],
    )
    max_score = MAX_SCORES.get(metric, 1.0)
    samples = [_classify_sample(lines, metric, max_score) for lines in lines_by_sample]
    counts = Counter(sample.kind for sample in samples)
    return ComparedSamples(
        _select_samples(samples, max_samples),
        {kind: counts[kind] for kind in AGREEMENT_KINDS},
        metric,
        max_score,
    )


def _classify_sample(
    lines: list[JsonObject | None], metric: str, max_score: float
) -> ComparedSample:
    scores = [read_scores(line).get(metric) if line else None for line in lines]
    known_scores = [score for score in scores if score is not None]
    score_range = max(known_scores, default=0.0) - min(known_scores, default=0.0)
    kind: AgreementKind = (
        "right" if known_scores and min(known_scores) >= max_score - MIN_SCORE_CHANGE else "wrong"
    )
    return ComparedSample(
        lines, scores, "differ" if score_range > MIN_SCORE_CHANGE else kind, score_range
    )


def _select_samples(samples: Sequence[ComparedSample], max_samples: int) -> list[ComparedSample]:
    """Select at most `max_samples` samples, largest score differences first.

    Samples with different scores get half, the other classes a quarter each. Classes with more
    samples use the quotas of smaller ones.
    """
    groups = {
        kind: [sample for sample in samples if sample.kind == kind] for kind in AGREEMENT_KINDS
    }
    groups["differ"].sort(key=lambda sample: -sample.score_range)
    fixed_quotas = {
        "differ": max_samples // 2,
        "wrong": max_samples // 4,
        "right": max_samples // 4,
    }
    quotas = {kind: min(len(group), fixed_quotas[kind]) for kind, group in groups.items()}
    for kind, group in groups.items():
        quotas[kind] += min(len(group) - quotas[kind], max_samples - sum(quotas.values()))
    return [sample for kind, group in groups.items() for sample in group[: quotas[kind]]]


def build_sample_data(
    samples: ComparedSamples, folders: Sequence[Path], formula_converter: FormulaConverter | None
) -> JsonData:
    """Return page data with samples, and `images` to which the samples refer by index."""
    data_builder = ExampleDataBuilder(folders, formula_converter)
    thumbnails, image_indices = data_builder.build_thumbnails(
        sample.question_line for sample in samples.displayed
    )
    return {
        "images": thumbnails,
        "examples": [
            {
                **data_builder.build_question(sample.question_line, image_indices),
                "kind": sample.kind,
                "predictions": [data_builder.build_answer(line) for line in sample.lines],
                "scores": [None if score is None else round(score, 4) for score in sample.scores],
            }
            for sample in samples.displayed
        ],
    }
