"""Metric of points: F1 and distance."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from finesight.evaluate.bootstrap import estimate_ratio
from finesight.evaluate.box_metrics import match_boxes, measure_closeness
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.samples.boxes import measure_distance


def score_pointing(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute F1, precision and recall of points, their distance, and parse rate.

    A point, or the center of a box, is correct inside a reference box, or close to a reference
    point (`MAX_DISTANCE`). The distance is the mean of the fractions of the image diagonal between
    the references and the nearest points; 1 without a point.
    """
    per_sample: list[MetricValues] = []
    counts = np.zeros((len(cases), 3))
    for i, case in enumerate(cases):
        num_found = len(case.boxes)
        num_wanted = len(case.reference_boxes)
        pairs = match_boxes(case.boxes, case.reference_boxes, case.image_size, measure_closeness)
        num_correct = len(pairs)
        counts[i] = num_correct, num_found, num_wanted
        f1 = 1.0
        if num_found + num_wanted:
            f1 = 2 * num_correct / (num_found + num_wanted)
        per_sample.append(
            {
                "f1": f1,
                "distance": _compute_mean_distance(case),
                "parse_rate": float(num_found > 0 or num_wanted == 0),
            }
        )
    num_correct_N, num_found_N, num_wanted_N = counts.T
    estimators = {
        "f1": estimate_ratio(2 * num_correct_N, num_found_N + num_wanted_N),
        "precision": estimate_ratio(num_correct_N, num_found_N),
        "recall": estimate_ratio(num_correct_N, num_wanted_N),
        **mean_metrics(per_sample, {"distance": "distance", "parse_rate": "parse_rate"}),
    }
    return MetricResult(per_sample, estimators)


def _compute_mean_distance(case: EvalCase) -> float:
    """Return the mean distance between the references and the nearest boxes, at most 1.

    Without references, it is 1 with boxes and 0 without.
    """
    if not case.reference_boxes:
        return float(len(case.boxes) > 0)
    distances = []
    for reference in case.reference_boxes:
        nearest = 1.0
        for found in case.boxes:
            distance = measure_distance(found.xyxy, reference.xyxy, case.image_size)
            nearest = min(nearest, distance)
        distances.append(nearest)
    return fmean(distances)
