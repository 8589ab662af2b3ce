"""Metric of LaTeX formulas."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finesight.evaluate.metrics.shared_scores import EXACT, SIMILARITY
from finesight.metric_components import MetricComponent, Score, TaskSuggestion

if TYPE_CHECKING:
    from finesight.settings.recipe_template import AnswerSummary

_LATEX = re.compile(r"\\[a-zA-Z]+|[_^]\{")


def detect(summary: AnswerSummary) -> bool:
    """Return whether most answers contain commands or scripts of LaTeX."""
    return summary.has_mostly(_LATEX.search)


COMPONENT = MetricComponent(
    kind="metrics",
    name="latex",
    title="LaTeX formulas",
    implementation="finesight.evaluate.metrics.latex.score:score_latex",
    position=1,
    primary_score="similarity",
    scores={
        "similarity": SIMILARITY,
        "exact": EXACT,
        "edit_distance": Score(
            title="edit distance", description="token edits per answer", lower_is_better=True
        ),
        "bleu": Score(title="BLEU", description="precision of n-grams of up to four tokens"),
        "rendered": Score(
            title="equal when rendered",
            description="formulas whose rendered image equals that of a reference",
            extra="latex",
        ),
        "rendered_share": Score(
            title="renderable share",
            description="samples with a reference that can be rendered",
        ),
    },
    answer_content="formula",
    unscored_reason="these references are no LaTeX that can be rendered",
    slow_scores=("rendered",),
    suggestion=TaskSuggestion(
        answer="write a formula as LaTeX",
        prompt="Write the formula as LaTeX.",
        detect=detect,
        detect_position=5,
    ),
)
