"""Metric of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import F1_MACRO
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary

MAX_CLASS_CHARS = 60
"""Maximum length of a class."""


def detect(summary: AnswerSummary) -> bool:
    """Return whether the answers are classes.

    The questions ask for a class, or the answers are a closed set of short texts, such as yes and
    no.
    """
    from finesight.samples.default_prompts import CLASS_INSTRUCTION
    from finesight.settings.recipe_template import is_closed_set

    if max(map(len, summary.answers)) > MAX_CLASS_CHARS or summary.max_boxes > 1:
        return False
    asks_class = summary.asks_mostly(lambda question: question.endswith(CLASS_INSTRUCTION))
    return asks_class or is_closed_set(summary.answers)


COMPONENT = MetricComponent(
    kind="metrics",
    name="classification",
    title="Classification",
    implementation="finesight.evaluate.metrics.classification.score:score_classification",
    position=4,
    primary_score="accuracy",
    scores={
        "accuracy": Score(
            title="accuracy", description="answers with the correct class", counts_answers=True
        ),
        "f1_macro": F1_MACRO,
    },
    describes_scenes=True,
    suggestion=TaskSuggestion(
        answer="choose one of several classes",
        lists_classes=True,
        max_pixels=262_144,
        detect=detect,
        detect_position=6,
    ),
)
