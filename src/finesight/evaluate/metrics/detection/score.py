"""Metric of all boxes of an image: F1 and average precision.

Answers contain no confidence, so all boxes have equal scores. Average precision ranks boxes like
COCO ranks ties: by sample order and by order within an answer. It depends slightly on this order.
F1 does not, and is the primary score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from finesight.evaluate.bootstrap import (
    FloatArray,
    SampleGroup,
    ScoreEstimator,
    build_grouped_sums,
    compute_typical_sizes,
    estimate_ratio,
    safe_divide,
)
from finesight.evaluate.box_metrics import compute_box_scores, normalize_label
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.samples.boxes import measure_overlap
from finesight.samples.frames import ImageSize
from finesight.samples.sample import BoxPart

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
NUM_COUNTS = 2 + len(IOU_THRESHOLDS)
RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
ROUNDING = 1e-9
MAX_DETECTIONS = 100
"""Maximum number of predicted boxes per class and image, as in COCO."""
NOTE_BIASED = "biased upwards on small sets: compare it on the same samples only"


@dataclass(frozen=True, slots=True)
class ClassDetections:
    """Predicted and reference boxes of one class over N samples.

    Attributes:
        sample_indices: Sample of each of D predicted boxes, in rank order.
        is_correct: Whether each predicted box is correct at each of 10 IoU thresholds, (10, D).
        num_references: Number of reference boxes of each sample, (N,).
    """

    sample_indices: NDArray[np.int64]
    is_correct: NDArray[np.bool_]
    num_references: FloatArray


def score_detection(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute F1, precision and recall at IoU 0.5, average precision, mean IoU and parse rate.

    Average precision is the mean over the classes of the references. It is reported as the mean
    over ten IoU thresholds, at 0.5 and at 0.75. Labels must match, ignoring case.
    """
    classes = match_detections(cases)
    counts, f1 = _sum_counts([_count_boxes(one) for one in classes], len(cases))
    num_predicted, num_references, num_correct = counts.T[:3]
    per_sample: list[MetricValues] = []
    for i, case in enumerate(cases):
        box_scores = compute_box_scores(case.boxes, case.reference_boxes, case.image_size)
        per_sample.append({"f1": float(f1[i, 0])} | box_scores)
    estimators = {
        "f1_at_0.5": estimate_ratio(2 * num_correct, num_predicted + num_references),
        "precision_at_0.5": estimate_ratio(num_correct, num_predicted),
        "recall_at_0.5": estimate_ratio(num_correct, num_references),
        **build_average_precision_fn(classes, len(cases)),
        **mean_metrics(per_sample, {"mean_iou": "iou", "parse_rate": "parse_rate"}),
    }
    return MetricResult(per_sample, estimators)


def match_detections(cases: Sequence[EvalCase]) -> list[ClassDetections]:
    """Match predicted and reference boxes of each class, as in COCO.

    Predicted boxes are matched in order. Each is matched with the unmatched reference box of the
    highest IoU, if that IoU reaches the threshold.
    """
    rows: dict[str, list[tuple[int, NDArray[np.bool_], int]]] = defaultdict(list)
    for i, case in enumerate(cases):
        predicted = _group_by_class(case.boxes)
        references = _group_by_class(case.reference_boxes)
        for key in sorted({*predicted, *references}):
            boxes = predicted[key][:MAX_DETECTIONS]
            is_correct = _match_at_thresholds(boxes, references[key], case.image_size)
            rows[key[1]].append((i, is_correct, len(references[key])))
    detections = []
    for _, own_rows in sorted(rows.items()):
        samples, matches, counts = zip(*own_rows, strict=True)
        sample_indices = np.repeat(samples, [len(one) for one in matches])
        num_references = np.bincount(samples, counts, len(cases)).astype(np.float64)
        is_correct = np.concatenate(matches).T
        detections.append(ClassDetections(sample_indices, is_correct, num_references))
    return detections


def _group_by_class(boxes: Sequence[BoxPart]) -> dict[tuple[int, str], list[BoxPart]]:
    """Group boxes by image index and label."""
    grouped: dict[tuple[int, str], list[BoxPart]] = defaultdict(list)
    for box in boxes:
        grouped[box.image, normalize_label(box)].append(box)
    return grouped


def _match_at_thresholds(
    predicted: Sequence[BoxPart], references: Sequence[BoxPart], image_size: ImageSize
) -> NDArray[np.bool_]:
    """Return whether each predicted box matches a reference box at each IoU threshold, (D, 10)."""
    overlaps = []
    for box in predicted:
        row = [measure_overlap(box.xyxy, reference.xyxy, image_size) for reference in references]
        overlaps.append(row)
    is_correct = np.zeros((len(predicted), len(IOU_THRESHOLDS)), np.bool_)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        free_references = set(range(len(references)))
        for i, row in enumerate(overlaps):
            # If overlaps are equal, the later reference box is matched, as in COCO.
            best = max(free_references, key=lambda j: (row[j], j), default=None)
            if best is not None and row[best] >= threshold:
                free_references.remove(best)
                is_correct[i, t] = True
    return is_correct


def build_average_precision_fn(
    classes: Sequence[ClassDetections], num_samples: int
) -> dict[str, ScoreEstimator]:
    """Return the estimators of COCO average precision over ten thresholds, at 0.5 and at 0.75.

    Average precision is the mean over 101 recall levels of the best precision at that recall or
    above, for each class and threshold, and then the mean over the classes of the references.
    Taking the maximum is biased upwards on small sets. Because all boxes have equal scores,
    precision does not depend on recall, and on large sets average precision is precision times
    recall. The interval is that of this product, which depends on counts only.
    """
    wanted_classes = [one for one in classes if one.num_references.any()]
    groups = [_count_boxes(one) for one in wanted_classes]
    reported = np.zeros(len(IOU_THRESHOLDS))
    if wanted_classes:
        by_threshold = [_compute_class_average_precision(one) for one in wanted_classes]
        reported = np.mean(by_threshold, axis=0)
    sizes, undefined_reason = compute_typical_sizes(groups, 1, num_samples, power=2)
    _, sample_f1 = _sum_counts(groups, num_samples)
    # The typical sample has as many predicted as reference boxes.
    boxes = np.arange(NUM_COUNTS) < 2
    sums = build_grouped_sums(groups, num_samples)
    # Thresholds 0.5 and 0.75 are the first and the sixth.
    chosen = {"ap": slice(None), "ap_50": slice(0, 1), "ap_75": slice(5, 6)}
    estimators = {}
    for name, thresholds in chosen.items():
        estimators[name] = ScoreEstimator(
            weighted_sums=sums,
            score_from_sums=partial(_asymptotic_precision, thresholds=thresholds),
            sample_rates=sample_f1[:, thresholds].mean(axis=1),
            pseudo_sums=np.outer(sizes, boxes).ravel(),
            pseudo_slope=np.outer(sizes, ~boxes).ravel(),
            is_biased=True,
            reported_score=float(reported[thresholds].mean()),
            undefined_reason=undefined_reason,
            note=NOTE_BIASED,
        )
    return estimators


def _count_boxes(one: ClassDetections) -> SampleGroup:
    """Count predicted, reference and correct boxes of one class in each sample.

    Correct boxes are counted at each IoU threshold.
    """
    counts = np.zeros((len(one.num_references), NUM_COUNTS))
    counts[:, 1] = one.num_references
    np.add.at(counts[:, 0], one.sample_indices, 1.0)
    np.add.at(counts[:, 2:], one.sample_indices, one.is_correct.T.astype(np.float64))
    used = np.flatnonzero(counts[:, :2].any(axis=1))
    return SampleGroup(used, counts[used])


def _sum_counts(groups: Sequence[SampleGroup], num_samples: int) -> tuple[FloatArray, FloatArray]:
    """Return the counts of `_count_boxes` over all classes (N, 12), and F1 by threshold (N, 10)."""
    counts = np.zeros((num_samples, NUM_COUNTS))
    for group in groups:
        counts[group.sample_indices] += group.values
    boxes = counts[:, :2].sum(axis=1, keepdims=True) + np.zeros(len(IOU_THRESHOLDS))
    return counts, np.where(boxes > 0, safe_divide(2 * counts[:, 2:], boxes), 1.0)


def _asymptotic_precision(sums: FloatArray, thresholds: slice) -> FloatArray:
    """Return the large-sample limit of average precision: (R, classes * 12) -> (R,)."""
    counts = sums.reshape(len(sums), -1, NUM_COUNTS)
    num_predicted = counts[..., :1]
    num_references = counts[..., 1:2]
    num_correct = counts[..., 2:][..., thresholds]
    precision = safe_divide(num_correct, np.broadcast_to(num_predicted, num_correct.shape))
    recall = safe_divide(num_correct, np.broadcast_to(num_references, num_correct.shape))
    # The added level is recall 0, which only a correct box reaches.
    reached = (np.floor(100 * recall + ROUNDING) + 1) * (num_correct > 0)
    by_class = (precision * reached / len(RECALL_LEVELS)).mean(axis=2)
    num_classes = (counts[..., 1] > 0).sum(axis=1) * 1.0
    return safe_divide(by_class.sum(axis=1), num_classes)


def _compute_class_average_precision(detections: ClassDetections) -> FloatArray:
    """Return the average precision of a class at each IoU threshold: (10,)."""
    result = np.zeros(len(IOU_THRESHOLDS))
    num_references = detections.num_references.sum()
    for t, is_correct in enumerate(detections.is_correct):
        # Recall increases, and precision has its maxima, at correct boxes only.
        correct_positions = np.flatnonzero(is_correct)
        hits = np.arange(1.0, len(correct_positions) + 1)
        precision = hits / (correct_positions + 1 + np.spacing(1))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # On the right side, so that a level that is reached exactly counts.
        num_recall_levels = np.searchsorted(RECALL_LEVELS, hits / num_references, side="right")
        result[t] = (np.diff(num_recall_levels, prepend=0) * best).sum() / len(RECALL_LEVELS)
    return result
