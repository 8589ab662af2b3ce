"""All tasks at a glance: how each is scored, and which figure stands for it.

A new one is a file with `score(cases) -> Scored`, a line in TASKS, and its name in config.TaskName.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finesight.config import Metric, TaskName
from finesight.errors import UserError
from finesight.evaluate import boxes, captions, classes, detection, fields, latex, own, qa, text
from finesight.evaluate.answered import Case, Score, Scored, Scores, Truth, means


@dataclass(frozen=True, slots=True)
class Task:
    """A way to score; `headline` names the figure that stands for all (higher is better), None
    for the first one that comes; `wants` is what the right answers have to hold."""

    headline: str | None
    score: Score
    wants: Literal["text", "box", "json", "anything"] = "text"


TASKS: dict[TaskName, Task] = {
    "captions": Task("cider_d", captions.score),
    "latex": Task("similarity", latex.score),
    "ocr": Task("similarity", text.score),
    "qa": Task("anls", qa.score),
    "classification": Task("accuracy", classes.score),
    "json": Task("f1", fields.score, wants="json"),
    "grounding": Task("accuracy_at_0.5", boxes.score, wants="box"),
    "detection": Task("f1_at_0.5", detection.score, wants="box"),
}

LOWER_IS_BETTER = frozenset({"edit_distance", "cer", "wer", "held_out_loss"})
"""All other scores grow with quality."""


def task_of(metric: Metric) -> Task:
    """The task of that name, or the user's own function. Raises UserError for a faulty file."""
    place = own.split(metric)
    if place is not None:
        return Task(None, own.load(*place), wants="anything")
    return next(task for name, task in TASKS.items() if name == metric)


def check_truths(metric: Metric, truths: Sequence[Truth]) -> None:
    """Refuse, as UserError, right answers none of which holds what the metric compares: without
    a box in the truth, an answer without boxes would count as perfect grounding."""
    task = task_of(metric)
    wants = task.wants
    if wants == "anything":
        _try_out(metric, task.score, truths[0])
    holds = [_holds(wants, truth) for truth in truths]
    if any(holds) and (wants != "json" or all(holds)):
        return
    wrong = f"not one of {len(truths)} right answers holds a {wants}"
    if wants == "json" and any(holds):
        wrong = f"the right answer {truths[holds.index(False)][0][0][:80]!r} is no JSON"
    raise UserError(
        wrong,
        where=f"metric {metric}",
        expected=f"samples whose last turn says it with a {wants} part"
        if wants != "json"
        else "samples whose last turn is a JSON object or list",
        remedy="choose the metric of this task, or import the data anew with its answers",
    )


def _try_out(metric: Metric, own_score: Score, truth: Truth) -> None:
    """Let the user's own function fail now rather than after all answers: on the right answer of a
    sample, and on an empty one, which models give."""
    texts, targets = truth
    tried = [Case(texts[0], targets, texts, targets), Case("", (), texts, targets)]
    scores = own_score(tried).scores
    taken = sorted(scores.keys() & (LOWER_IS_BETTER | {"stopped"}))
    if taken:
        raise UserError(
            f"a figure named {taken[0]}",
            where=f"metric {metric}",
            expected="a name that does not mean something else already: more is better of your own"
            " figures, less of an error rate",
            remedy=f"give it another name and, of an error rate, 1 - {taken[0]}",
        )


def _holds(wants: str, truth: Truth) -> bool:
    texts, targets = truth
    if wants == "json":
        return any(fields.form_of(one) is not None for one in texts)
    if wants == "box":
        return bool(targets)
    return wants == "anything" or bool("".join(texts).strip())


def score(metric: Metric, cases: Sequence[Case]) -> Scored:
    """Figures of at least one answer by a task's measure, and the share of `stopped` ones."""
    assert cases, "nothing to score"
    scored = task_of(metric).score(cases)
    stopped = means([{"stopped": float(case.stopped)} for case in cases])
    return replace(scored, estimators=scored.estimators | stopped)


def headline_of(metric: Metric, scores: Scores) -> str:
    """The figure that stands for all; of the user's own ones the first."""
    tasks = [task for name, task in TASKS.items() if name == metric]
    return (tasks[0].headline if tasks else None) or next(iter(scores))
