"""Scores of several metrics."""

from __future__ import annotations

from finesight.metric_components import Score

SIMILARITY = Score(
    title="similarity", description="1 minus the normalized edit distance", preference=0
)
EXACT = Score(
    title="exact match",
    description="answers equal to a reference",
    counts_answers=True,
    preference=1,
)
F1 = Score(
    title="F1",
    description="agreement of words, classes, fields or points with the reference: harmonic mean"
    " of precision and recall",
    preference=4,
)
F1_MACRO = Score(title="macro F1", description="mean of the F1 of all classes or fields")
PARSE_RATE = Score(title="parsable answers", description="answers that could be parsed")
MEAN_IOU = Score(
    title="mean IoU", description="overlap with the reference boxes", sample_score="iou"
)

BOX_SCORES = {
    "mean_iou": MEAN_IOU,
    "parse_rate": PARSE_RATE,
    "iou": Score(title="IoU", preference=3),
    "hit": Score(title="hit at IoU 0.5", preference=2),
    "hit_at_0.75": Score(title="hit at IoU 0.75"),
}
"""Scores of boxes, those of a sample included."""
