"""From answers and truths to figures, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from finesight.config import Metric
from finesight.data.sample import BoxPart, Message, Sample, TextPart
from finesight.errors import UserError
from finesight.evaluate.captions import bleu, cider_d, rouge_l, words
from finesight.evaluate.grounding import box_scores
from finesight.evaluate.text import edit_distance, folded_text, latex_tokens, plain_text

Scores = dict[str, float]

Truth = tuple[tuple[str, ...], tuple[BoxPart, ...]]
"""Right answers to one question: texts of which any will do, and boxes that are all wanted."""

LOWER_IS_BETTER = frozenset({"edit_distance", "cer", "held_out_loss"})
"""All other scores grow with quality."""


@dataclass(frozen=True, slots=True)
class Case:
    """One answer beside what would have been right: any of `truths`, or all of `targets`."""

    answer: str
    boxes: tuple[BoxPart, ...]
    truths: tuple[str, ...]
    targets: tuple[BoxPart, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """Figures of the whole set, and of each answer alone."""

    scores: Scores
    each: list[Scores]


@dataclass(frozen=True, slots=True)
class Task:
    """A way to score; `headline` names the figure that stands for all (higher is better)."""

    headline: str
    score: Callable[[Sequence[Case]], Scored]


def truths_of(sample: Sample) -> Truth:
    """The right answers of a sample as texts (its last turn first, then its references), and the
    boxes of that turn. Raises UserError when its last turn is not the assistant's."""
    last = sample.messages[-1]
    if last.role != "assistant":
        raise UserError(
            f"sample {sample.id!r} ends with a turn of the {last.role}",
            expected="a last turn of the assistant: the right answer, to compare with",
            remedy="score on samples that have answers, or use `finesight predict --data`",
        )
    boxes = tuple(part for part in last.content if isinstance(part, BoxPart))
    return (_text(last), *sample.references), boxes


def check_truths(metric: Metric, truths: Sequence[Truth]) -> None:
    """Refuse, as UserError, right answers none of which holds what the metric compares: without
    a box in the truth, an answer without boxes would count as perfect grounding."""
    wanted = "box" if metric == "grounding" else "text"
    if not any(boxes if wanted == "box" else "".join(texts).strip() for texts, boxes in truths):
        raise UserError(
            f"not one of {len(truths)} right answers holds a {wanted}",
            where=f"metric {metric}",
            expected=f"samples whose last turn says it with a {wanted} part",
            remedy="choose the metric of this task, or import the data anew with its answers",
        )


def score(metric: Metric, cases: Sequence[Case]) -> Scored:
    """Figures of at least one answer by a task's measure."""
    assert cases, "nothing to score"
    return TASKS[metric].score(cases)


def _text(message: Message) -> str:
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


def _captions(cases: Sequence[Case]) -> Scored:
    said = [words(case.answer) for case in cases]
    truths = [[words(truth) for truth in case.truths] for case in cases]
    rouge = [rouge_l(s, t) for s, t in zip(said, truths, strict=True)]
    cider = cider_d(said, truths)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(said, truths), start=1)}
    scores |= {"rouge_l": fmean(rouge), "cider_d": fmean(cider)}
    return Scored(scores, [{"rouge_l": r, "cider_d": c} for r, c in zip(rouge, cider, strict=True)])


def _latex(cases: Sequence[Case]) -> Scored:
    each = []
    for case in cases:
        said = latex_tokens(case.answer)
        nearest = min((_edits(said, latex_tokens(truth)) for truth in case.truths), key=_share)
        each.append(
            {
                "similarity": 1.0 - _share(nearest),
                "exact": float(nearest[0] == 0),
                "edit_distance": float(nearest[0]),
            }
        )
    return Scored(_means(each), each)


def _ocr(cases: Sequence[Case]) -> Scored:
    each, edits, length = [], 0, 0
    for case in cases:
        said, truths = plain_text(case.answer), [plain_text(truth) for truth in case.truths]
        found = [_edits(said, truth) for truth in truths]
        nearest, truth = min(zip(found, truths, strict=True), key=lambda pair: _share(pair[0]))
        distance = nearest[0]
        folded = {folded_text(truth) for truth in case.truths}
        each.append(
            {
                "similarity": 1.0 - _share(nearest),
                "exact": float(distance == 0),
                "exact_folded": float(folded_text(case.answer) in folded),
                "cer": distance / max(1, len(truth)),
            }
        )
        edits, length = edits + distance, length + len(truth)
    # The character error rate of a set is that of its texts end to end, not a mean of rates.
    return Scored(_means(each) | {"cer": edits / max(1, length)}, each)


def _grounding(cases: Sequence[Case]) -> Scored:
    each = [box_scores(case.boxes, case.targets) for case in cases]
    mean = _means(each)
    scores = {
        "accuracy_at_0.5": mean["hit"],
        "mean_iou": mean["iou"],
        "parse_rate": mean["parsed"],
    }
    return Scored(scores, each)


def _edits(said: Sequence[str], truth: Sequence[str]) -> tuple[int, int]:
    return edit_distance(said, truth), max(len(said), len(truth))


def _share(edits: tuple[int, int]) -> float:
    distance, longest = edits
    return distance / max(1, longest)


def _means(each: Sequence[Scores]) -> Scores:
    return {name: fmean(scores[name] for scores in each) for name in each[0]}


TASKS: dict[Metric, Task] = {
    "captions": Task("cider_d", _captions),
    "latex": Task("similarity", _latex),
    "ocr": Task("similarity", _ocr),
    "grounding": Task("accuracy_at_0.5", _grounding),
}
