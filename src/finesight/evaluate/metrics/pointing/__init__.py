"""Metric of points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import F1, PARSE_RATE
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers have boxes or points, and most of these are points."""
    return summary.has_boxes and 2 * summary.num_points > summary.num_boxes


COMPONENT = MetricComponent(
    kind="metrics",
    name="pointing",
    title="Pointing",
    implementation="finesight.evaluate.metrics.pointing.score:score_pointing",
    position=9,
    primary_score="f1",
    reference_kind="box or point",
    scores={
        "f1": F1,
        "distance": Score(
            title="distance",
            description="distance of points as a fraction of the image diagonal",
            lower_is_better=True,
        ),
        "parse_rate": PARSE_RATE,
        "precision": Score(title="precision"),
        "recall": Score(title="recall"),
    },
    answer_content="points",
    lists_boxes=True,
    describes_scenes=True,
    suggestion=TaskSuggestion(
        answer="point to objects or their parts",
        prompt="Point to all objects.",
        detect=detect,
        detect_position=1,
    ),
)
