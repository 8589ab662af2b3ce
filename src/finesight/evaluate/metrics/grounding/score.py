"""Metric of boxes that questions name: accuracy and IoU."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.evaluate.box_metrics import compute_box_scores
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics


def score_grounding(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute accuracy at IoU 0.5 and 0.75, mean IoU and parse rate."""
    per_sample = [
        compute_box_scores(case.boxes, case.reference_boxes, case.image_size) for case in cases
    ]
    sources = {"accuracy_at_0.5": "hit", "accuracy_at_0.75": "hit_at_0.75"}
    sources |= {"mean_iou": "iou", "parse_rate": "parse_rate"}
    return MetricResult(per_sample, mean_metrics(per_sample, sources))
