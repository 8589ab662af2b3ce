"""Metrics of compared runs with confidence intervals, and differences from the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.eval_case import MetricResult, mean_metrics
from finesight.evaluate.metric_difference import (
    MetricDifference,
    build_unsampled_difference,
    compare_results,
)
from finesight.evaluate.task_metrics import LOWER_IS_BETTER, TASK_METRICS, compute_metrics
from finesight.report.compared_runs import (
    ComparedRun,
    SampleKey,
    explain_loss_mismatch,
    find_common_samples,
    is_custom_metric,
)
from finesight.report.metrics import (
    VALIDATION_LOSS,
    IntervalBounds,
    MetricChange,
    get_note,
    parse_interval,
    read_interval,
    read_metrics,
)


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
