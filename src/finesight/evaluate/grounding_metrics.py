"""Grounding metrics: IoU and accuracy of predicted boxes."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.data.boxes import iou
from finesight.data.sample import BoxPart
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics


def score_grounding(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute accuracy at IoU 0.5 and 0.75, mean IoU and parse rate."""
    per_sample = [compute_box_scores(case.boxes, case.reference_boxes) for case in cases]
    sources = {
        "accuracy_at_0.5": "hit",
        "accuracy_at_0.75": "hit_at_0.75",
        "mean_iou": "iou",
        "parse_rate": "parsed",
    }
    return MetricResult(per_sample, mean_metrics(per_sample, sources))


def match_boxes(
    predicted: Sequence[BoxPart], references: Sequence[BoxPart]
) -> list[tuple[int, int, float]]:
    """Match predicted and reference boxes one-to-one.

    Pairs are selected greedily by descending IoU, as in detection benchmarks. Only boxes of the
    same image match. Labels must match (ignoring case) only if the references have several labels,
    because the question already names a single target.

    Returns:
        (predicted index, reference index, IoU) of each pair.
    """
    must_match_labels = len({normalize_label(t) for t in references}) > 1
    pairs = [
        (iou(f.xyxy, t.xyxy), i, j)
        for i, f in enumerate(predicted)
        for j, t in enumerate(references)
        if f.image == t.image
        and (not must_match_labels or normalize_label(f) == normalize_label(t))
    ]
    free_predicted, free_references = set(range(len(predicted))), set(range(len(references)))
    matches = []
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if overlap > 0 and i in free_predicted and j in free_references:
            free_predicted.remove(i)
            free_references.remove(j)
            matches.append((i, j, overlap))
    return matches


def compute_box_scores(
    predicted: Sequence[BoxPart], references: Sequence[BoxPart]
) -> dict[str, float]:
    """Compute the box scores of one answer: `parsed`, `iou`, `hit` and `hit_at_0.75`.

    `parsed` is 1 if the answer has a box. The other scores are sums over the pairs of `match_boxes`
    (IoU, IoU of at least 0.5 and 0.75), divided by the larger number of boxes: missing and
    additional boxes cost the same. With one reference box and one predicted box they are the IoU
    and accuracy of referring expressions. Without reference boxes the correct answer has no boxes.
    """
    max_boxes = max(len(predicted), len(references))
    if max_boxes == 0:
        return {"parsed": 1.0, "iou": 1.0, "hit": 1.0, "hit_at_0.75": 1.0}
    overlaps = [overlap for _, _, overlap in match_boxes(predicted, references)]
    return {
        "parsed": float(len(predicted) > 0),
        "iou": sum(overlaps) / max_boxes,
        "hit": sum(overlap >= 0.5 for overlap in overlaps) / max_boxes,
        "hit_at_0.75": sum(overlap >= 0.75 for overlap in overlaps) / max_boxes,
    }


def normalize_label(box: BoxPart) -> str:
    """Return the label in lower case with normalized whitespace; empty without a label."""
    return " ".join((box.label or "").casefold().split())
