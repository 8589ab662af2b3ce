"""Metric of short answers to questions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import EXACT, F1
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary

MIN_CAPTION_WORDS = 8
"""Minimum mean number of words of answers to several questions that are captions."""

_QUESTION = re.compile(
    "(?i)[?？]$|^(?:what|which|who|whose|whom|where|when|why|how|is|are|was|were|do|does|did|can"
    "|could|has|have|will|would)\\b|什么|多少|几|哪|谁|吗|怎"
)


def detect(summary: AnswerSummary) -> bool:
    """Return whether several questions have short answers.

    Few imperative questions are paraphrases of one prompt.
    """
    num_answers = len(summary.answers)
    num_paraphrases = max(1, min(max(10, num_answers**0.5), num_answers / 2))
    if summary.asks_mostly(_QUESTION.search):
        num_paraphrases = 1
    has_questions = len(summary.questions) > num_paraphrases
    return has_questions and summary.mean_words < MIN_CAPTION_WORDS


COMPONENT = MetricComponent(
    kind="metrics",
    name="qa",
    title="Answers to questions",
    implementation="finesight.evaluate.metrics.qa.score:score_qa",
    position=3,
    primary_score="anls",
    scores={
        "anls": Score(
            title="ANLS", description="similarity to a reference, 0 below 0.5", preference=5
        ),
        "exact": EXACT,
        "f1": F1,
    },
    describes_scenes=True,
    suggestion=TaskSuggestion(
        answer="answer a question in a few words",
        prompt="Answer the question.",
        detect=detect,
        detect_position=7,
    ),
)
