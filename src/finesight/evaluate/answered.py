"""An answer beside what would have been right, and what a way to score makes of many of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finesight.data.sample import BoxPart, Sample, TextPart
from finesight.encode.thought import apart
from finesight.errors import UserError
from finesight.evaluate.bootstrap import Figures, Interval, interval, ratios, resampled, whole

Scores = dict[str, float]

Truth = tuple[tuple[str, ...], tuple[BoxPart, ...]]
"""Right answers to one question: texts of which any will do, and boxes that are all wanted."""


@dataclass(frozen=True, slots=True)
class Case:
    """One answer beside what would have been right: any of `truths`, or all of `targets`. `id` is
    the sample's; `stopped` says whether the answer ended by itself."""

    answer: str
    boxes: tuple[BoxPart, ...]
    truths: tuple[str, ...]
    targets: tuple[BoxPart, ...]
    id: str = ""
    stopped: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """What a task's measure makes of N answers.

    `each` holds figures of every answer alone, `figures` computes those of the whole set from how
    often each answer counts, and `details` is what does not fit into figures, for machines: the
    confusion of classes, the fields of a form.
    """

    each: list[Scores]
    figures: Figures
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """The figures of the set."""
        once = self.figures(whole(len(self.each)))
        return {name: float(value[0]) for name, value in once.items()}

    def intervals(self) -> dict[str, Interval]:
        """Bootstrap intervals of the figures."""
        found = resampled(len(self.each), self.figures)
        return {name: interval(values, len(self.each)) for name, values in found.items()}


Score = Callable[[Sequence[Case]], Scored]
"""A way to score at least one answer."""


def means(each: Sequence[Scores], **names: str) -> Figures:
    """Figures that are means over the answers; `names` maps a figure to the score of each answer
    that it is the mean of, by default all under their own names."""
    chosen = names or {name: name for name in each[0]}
    ones = np.ones(len(each))
    return together(
        {
            figure: ratios(np.array([scores[name] for scores in each], np.float64), ones)
            for figure, name in chosen.items()
        }
    )


def together(figures: Mapping[str, Callable[..., Any]]) -> Figures:
    """Figures by name as one function of the weights."""
    return lambda weights: {name: figure(weights) for name, figure in figures.items()}


def truths_of(sample: Sample, *, thinks: bool = False) -> Truth:
    """The right answers of a sample as texts (its last turn first, then its references), and the
    boxes of that turn. `thinks`: a thought in front of the answer is none of it. Raises UserError
    when its last turn is not the assistant's."""
    last = sample.messages[-1]
    if last.role != "assistant":
        raise UserError(
            f"sample {sample.id!r} ends with a turn of the {last.role}",
            expected="a last turn of the assistant: the right answer, to compare with",
            remedy="score on samples that have answers, or use `finesight predict --data`",
        )
    said = apart(last.content).answer if thinks else last.content
    boxes = tuple(part for part in said if isinstance(part, BoxPart))
    text = "".join(part.text for part in said if isinstance(part, TextPart))
    return (text, *sample.references), boxes
