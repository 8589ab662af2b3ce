"""Matching and scores of boxes and points, for several metrics and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finesight.samples.boxes import box_area, contains_center, measure_overlap
from finesight.samples.frames import Box, ImageSize
from finesight.samples.image_file import DEFAULT_SIZE
from finesight.samples.sample import BoxPart


def measure_closeness(box: Box, reference: Box, image_size: ImageSize) -> float:
    """Return 1 for a correct place, and 0 at `MAX_DISTANCE` or outside a reference box."""
    if box_area(reference):
        return float(contains_center(reference, box))
    return measure_overlap(box, reference, image_size)


def match_boxes(
    predicted: Sequence[BoxPart],
    references: Sequence[BoxPart],
    image_size: ImageSize = DEFAULT_SIZE,
    overlap_fn: Callable[[Box, Box, ImageSize], float] = measure_overlap,
    labels: Sequence[Sequence[str]] = (),
) -> list[tuple[int, int, float]]:
    """Match predicted and reference boxes one-to-one.

    Pairs are selected greedily by descending overlap, as in detection benchmarks. Only boxes of the
    same image match. Labels must match (ignoring case) only if the references have several, because
    the question already names a single target. If `labels` of both are given, these must match.

    Returns:
        (predicted index, reference index, overlap) of each pair.
    """
    if labels:
        predicted_labels, reference_labels = labels
        must_match_labels = True
    else:
        predicted_labels = [*map(normalize_label, predicted)]
        reference_labels = [*map(normalize_label, references)]
        must_match_labels = len(set(reference_labels)) > 1
    pairs = []
    for i, found in enumerate(predicted):
        for j, reference in enumerate(references):
            if found.image != reference.image:
                continue
            if must_match_labels and predicted_labels[i] != reference_labels[j]:
                continue
            pairs.append((overlap_fn(found.xyxy, reference.xyxy, image_size), i, j))
    free_predicted = set(range(len(predicted)))
    free_references = set(range(len(references)))
    matches = []
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if overlap > 0 and i in free_predicted and j in free_references:
            free_predicted.remove(i)
            free_references.remove(j)
            matches.append((i, j, overlap))
    return matches


def compute_box_scores(
    predicted: Sequence[BoxPart],
    references: Sequence[BoxPart],
    image_size: ImageSize = DEFAULT_SIZE,
) -> dict[str, float]:
    """Compute the box scores of one answer: `hit`, `hit_at_0.75`, `iou` and `parse_rate`.

    `parse_rate` is 1 if the answer has a box. The others are sums over the pairs of `match_boxes`
    (overlap, overlap of at least 0.5 and 0.75), divided by the larger number of boxes: missing and
    additional boxes cost the same. With one reference box and one predicted box they are the IoU
    and accuracy of referring expressions. Without reference boxes the correct answer has no boxes.
    """
    max_boxes = max(len(predicted), len(references))
    if max_boxes == 0:
        return {"hit": 1.0, "hit_at_0.75": 1.0, "iou": 1.0, "parse_rate": 1.0}
    overlaps = [overlap for _, _, overlap in match_boxes(predicted, references, image_size)]
    return {
        "hit": sum(overlap >= 0.5 for overlap in overlaps) / max_boxes,
        "hit_at_0.75": sum(overlap >= 0.75 for overlap in overlaps) / max_boxes,
        "iou": sum(overlaps) / max_boxes,
        "parse_rate": float(len(predicted) > 0),
    }


def normalize_label(box: BoxPart) -> str:
    """Return the label in lower case with normalized whitespace; empty without a label."""
    return " ".join((box.label or "").casefold().split())
