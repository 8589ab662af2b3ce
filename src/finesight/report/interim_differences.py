"""Estimate confidence intervals of metric differences while a run is in progress.

A finished run has computed them from its predictions. During training, this would be too slow for
some metrics, and reports never execute custom metrics. For metrics that are means over samples, the
recorded per-sample scores are sufficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finesight.evaluate.bootstrap import (
    BOUNDED,
    UNBOUNDED,
    FloatArray,
    ScoreEstimator,
    estimate_mean,
)
from finesight.evaluate.metric_difference import MetricDifference, compare_estimators
from finesight.report.examples import PER_SAMPLE_METRICS, pair_predictions, read_scores
from finesight.report.run_reader import JsonObject

MAX_MEAN_ERROR = 1e-6
"""Maximum difference of a metric from the mean of its per-sample scores.

With a larger difference, the metric is not a mean.
"""


def estimate_differences(
    before: Path,
    after: Path,
    before_metrics: Mapping[str, float],
    after_metrics: Mapping[str, float],
) -> dict[str, MetricDifference]:
    """Estimate the differences of all metrics that are means over samples.

    Args:
        before: Earlier prediction file.
        after: Later prediction file.
        before_metrics: Recorded metrics of the earlier evaluation.
        after_metrics: Recorded metrics of the later evaluation.

    Returns:
        Difference with confidence interval by metric name. Other metrics are omitted.
    """
    line_pairs = [
        (before_line, after_line)
        for before_line, after_line in pair_predictions(before, after)
        if before_line is not None and after_line is not None
    ]
    old_means: dict[str, ScoreEstimator] = {}
    new_means: dict[str, ScoreEstimator] = {}
    if not line_pairs:
        return {}
    for name in before_metrics.keys() & after_metrics.keys():
        before_scores, after_scores = (
            _read_score_column(name, lines) for lines in zip(*line_pairs, strict=True)
        )
        if before_scores is None or after_scores is None:
            continue
        if (
            abs(before_scores.mean() - before_metrics[name]) < MAX_MEAN_ERROR
            and abs(after_scores.mean() - after_metrics[name]) < MAX_MEAN_ERROR
        ):
            bounds = (
                BOUNDED if _is_bounded(before_scores) and _is_bounded(after_scores) else UNBOUNDED
            )
            old_means[name], new_means[name] = (
                estimate_mean(before_scores, bounds),
                estimate_mean(after_scores, bounds),
            )
    return {difference.name: difference for difference in compare_estimators(old_means, new_means)}


def _is_bounded(values: FloatArray) -> bool:
    """Return whether all scores are between 0 and 1."""
    return bool(((values >= 0) & (values <= 1)).all())


def _read_score_column(metric: str, lines: tuple[JsonObject, ...]) -> FloatArray | None:
    """Return one score of every prediction, or None if any prediction lacks it."""
    if metric == "stopped":
        return np.array([float(line.get("stopped") is True) for line in lines])
    scores = [read_scores(line).get(PER_SAMPLE_METRICS.get(metric, metric)) for line in lines]
    return None if None in scores else np.array(scores, np.float64)
