"""Metric of boxes that questions name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import BOX_SCORES
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers have a box."""
    return summary.has_boxes


COMPONENT = MetricComponent(
    kind="metrics",
    name="grounding",
    title="Grounding",
    implementation="finesight.evaluate.metrics.grounding.score:score_grounding",
    position=7,
    primary_score="accuracy_at_0.5",
    reference_kind="box",
    scores={
        "accuracy_at_0.5": Score(
            title="accuracy at IoU 0.5",
            description="boxes with an IoU of at least 0.5",
            condition="an IoU of at least 0.5",
            sample_score="hit",
        ),
        "accuracy_at_0.75": Score(
            title="accuracy at IoU 0.75",
            description="boxes with an IoU of at least 0.75",
            condition="an IoU of at least 0.75",
            sample_score="hit_at_0.75",
        ),
        **BOX_SCORES,
    },
    answer_content="boxes",
    describes_scenes=True,
    suggestion=TaskSuggestion(
        answer="find the object that the question names",
        prompt="Locate the object.",
        max_pixels=602_112,
        detect=detect,
        detect_position=3,
    ),
)
