"""Metric of image captions with one or more references."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary


def detect(summary: AnswerSummary) -> bool:
    """Return True: answers that are no others are captions."""
    return True


COMPONENT = MetricComponent(
    kind="metrics",
    name="captions",
    title="Captions",
    implementation="finesight.evaluate.metrics.captions.score:score_captions",
    position=0,
    primary_score="cider_d",
    scores={
        "cider_d": Score(
            title="CIDEr-D",
            description="agreement of word sequences with the reference captions, rare ones count"
            " more (TF-IDF)",
            maximum=10.0,
            preference=6,
        ),
        "rouge_l": Score(
            title="ROUGE-L", description="longest common subsequence of words", preference=7
        ),
        **{f"bleu_{order}": Score(title=f"BLEU-{order}") for order in range(1, 5)},
    },
    describes_scenes=True,
    suggestion=TaskSuggestion(
        answer="describe the image in sentences",
        prompt="Describe the image.",
        max_pixels=262_144,
        reward="captions.rouge_l",  # CIDEr-D is 0 for all responses to one image
        detect=detect,
        detect_position=9,
    ),
)
