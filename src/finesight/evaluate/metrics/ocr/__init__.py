"""Metric of texts that images show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import EXACT, SIMILARITY
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary

MAX_MEAN_WORDS = 4
"""Mean number of words below which answers are texts of an image instead of captions."""


def detect(summary: AnswerSummary) -> bool:
    """Return whether answers have few words."""
    return summary.mean_words < MAX_MEAN_WORDS


COMPONENT = MetricComponent(
    kind="metrics",
    name="ocr",
    title="Read texts",
    implementation="finesight.evaluate.metrics.ocr.score:score_ocr",
    position=2,
    primary_score="similarity",
    scores={
        "similarity": SIMILARITY,
        "exact": EXACT,
        "exact_folded": Score(
            title="exact match, ignoring case and width",
            description="exact match, ignoring case and character width",
        ),
        "cer": Score(
            title="CER",
            description="character edits divided by the characters of the references",
            lower_is_better=True,
        ),
        "wer": Score(
            title="WER",
            description="word edits divided by the words of the references",
            lower_is_better=True,
        ),
    },
    suggestion=TaskSuggestion(
        answer="read the text of the image",
        prompt="Read the text.",
        alternative="captions",  # short ones, or without spaces between words
        detect=detect,
        detect_position=8,
    ),
)
