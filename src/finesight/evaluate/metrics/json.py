"""Metric of fields in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import EXACT, F1, F1_MACRO, MEAN_IOU, PARSE_RATE
from finesight.metric_components import MetricComponent, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers are JSON objects."""
    from finesight.files.bounded_files import is_object_text

    return summary.has_mostly(is_object_text)


COMPONENT = MetricComponent(
    kind="metrics",
    name="json",
    title="JSON fields",
    implementation="finesight.evaluate.json_metrics:score_json",
    position=5,
    primary_score="f1",
    reference_kind="json",
    scores={
        "f1": F1,
        "f1_macro": F1_MACRO,
        "exact": EXACT,
        "parse_rate": PARSE_RATE,
        "mean_iou": MEAN_IOU,
    },
    answer_content="fields",
    unscored_reason="these references are no JSON",
    suggestion=TaskSuggestion(
        answer="read fields, such as shop, date and total, as JSON",
        prompt="Return the fields as JSON.",
        fields_prompt="Return {fields} as JSON.",
        detect=detect,
        detect_position=0,
    ),
)
