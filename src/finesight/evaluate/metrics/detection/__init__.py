"""Metric of all boxes of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import BOX_SCORES, F1
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers have boxes, and some have several or one of several classes.

    Different labels after one question are classes, after several they repeat the questions.
    """
    has_classes = len(summary.questions) == 1 and len(summary.labels) > 1
    return summary.has_boxes and (summary.max_boxes > 1 or has_classes)


COMPONENT = MetricComponent(
    kind="metrics",
    name="detection",
    title="Detection",
    implementation="finesight.evaluate.metrics.detection.score:score_detection",
    position=8,
    primary_score="f1_at_0.5",
    reference_kind="box",
    scores={
        "f1_at_0.5": Score(
            title="F1 at IoU 0.5",
            description="boxes that agree with a reference box: harmonic mean of precision and"
            " recall",
            condition="an IoU of at least 0.5",
            sample_score="f1",
        ),
        "precision_at_0.5": Score(title="precision at IoU 0.5"),
        "recall_at_0.5": Score(title="recall at IoU 0.5"),
        "ap": Score(
            title="AP", description="average precision over ten IoU thresholds, 0.5 to 0.95"
        ),
        "ap_50": Score(title="AP at IoU 0.5"),
        "ap_75": Score(title="AP at IoU 0.75"),
        "f1": F1,
        **BOX_SCORES,
    },
    answer_content="boxes",
    lists_boxes=True,
    describes_scenes=True,
    size_warning="Average precision decreases with the size of a dataset. {} and {} answered {:,}"
    " and {:,} samples, so their AP values are not comparable. The differences use the samples"
    " that both answered.",
    suggestion=TaskSuggestion(
        answer="find all objects of given classes",
        prompt="Locate all objects.",
        detect=detect,
        detect_position=2,
    ),
)
