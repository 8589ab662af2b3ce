"""An answer beside what would have been right, and what a way to score makes of many of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finesight.data.sample import BoxPart, Sample, TextPart
from finesight.encode.thought import apart
from finesight.errors import UserError
from finesight.evaluate.bootstrap import BOUNDED, Ends, Estimator, intervals, mean
from finesight.evaluate.proportions import Interval

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

    `each` holds figures of every answer alone, `estimators` compute those of the whole set, and
    `details` is what does not fit into figures, for machines: the confusion of classes, the fields
    of a form.
    """

    each: list[Scores]
    estimators: dict[str, Estimator]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """The figures of the set."""
        return {name: one.score for name, one in self.estimators.items()}

    def intervals(self) -> dict[str, Interval | None]:
        """Return the 95 % interval of each score, None where there is none."""
        return intervals(self.estimators)

    def notes(self) -> dict[str, str]:
        """Return why a score has no interval, or a warning about it, by the name of the score."""
        notes = {name: one.missing() or one.note for name, one in self.estimators.items()}
        return {name: note for name, note in notes.items() if note}


def note_lines(notes: Mapping[str, str]) -> list[str]:
    """Return a line for each note, with the names of its scores in front."""
    names: dict[str, list[str]] = {}
    for name, note in notes.items():
        names.setdefault(note, []).append(name)
    return [f"{', '.join(several)}: {note}" for note, several in names.items() if note]


Score = Callable[[Sequence[Case]], Scored]
"""A way to score at least one answer."""


def means(
    each: Sequence[Scores],
    names: Mapping[str, str] | None = None,
    bounds: Mapping[str, Ends] | Ends = BOUNDED,
) -> dict[str, Estimator]:
    """Return estimators of means over the answers.

    Args:
        each: Scores of every answer.
        names: The score of an answer by the name of its mean. By default all, under their names.
        bounds: Of all scores, or of some by name; the others are in [0, 1].
    """
    chosen = names or {name: name for name in each[0]}
    return {
        figure: mean(
            np.array([scores[name] for scores in each], np.float64),
            bounds.get(figure, BOUNDED) if isinstance(bounds, Mapping) else bounds,
        )
        for figure, name in chosen.items()
    }


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
