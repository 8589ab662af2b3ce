"""Metric of tool calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import EXACT, F1, F1_MACRO, MEAN_IOU, PARSE_RATE
from finesight.metric_components import MetricComponent, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers contain a tool call."""
    from finesight.samples.sample import TOOL_CALL_START

    return summary.has_mostly(lambda answer: TOOL_CALL_START in answer)


COMPONENT = MetricComponent(
    kind="metrics",
    name="tool_calls",
    title="Tool calls",
    implementation="finesight.evaluate.metrics.tool_calls.score:score_tool_calls",
    position=6,
    primary_score="exact",
    reference_kind="tool call",
    scores={
        "f1": F1,
        "f1_macro": F1_MACRO,
        "exact": EXACT,
        "parse_rate": PARSE_RATE,
        "mean_iou": MEAN_IOU,
    },
    suggestion=TaskSuggestion(
        answer="call tools with arguments",
        detect=detect,
        detect_position=4,
    ),
)
