"""Held-out samples with their answers before and after: which got better, and which got worse."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finesight.report.record import Line, is_finite, read_lines

Kind = Literal["better", "worse", "wrong", "right"]
KINDS: tuple[Kind, ...] = ("worse", "better", "wrong", "right")
"""What became of a sample: its figure fell, rose, stayed below full marks, stayed at them. In the
order in which examples are kept when there are too many."""

BY_SAMPLE = {
    "accuracy_at_0.5": "hit",
    "accuracy_at_0.75": "hit_at_0.75",
    "f1_at_0.5": "f1",
    "mean_iou": "iou",
    "parse_rate": "parsed",
}
"""Figures of a set whose figure for each sample has another name."""

STANDS_FOR = ("similarity", "exact", "hit", "iou", "f1", "anls", "cider_d", "rouge_l")
"""Figures of a sample by which to judge where the headline has none of its own."""

FULL_MARKS = {"cider_d": 10.0}
"""The highest that a sample's figure can be, where that is not 1."""

LEAST = 1e-6
"""A smaller change of a figure is rounding."""


@dataclass(frozen=True)
class Example:
    """A sample and its lines in the files of answers; `before` or `after` may be missing.

    `figure` is the name of the score that was compared, and `change` how much it rose, where both
    lines have it.
    """

    before: Line | None
    after: Line | None
    kind: Kind
    change: float

    @property
    def any(self) -> Line:
        """The later line: what was asked is the same in both."""
        line = self.before if self.after is None else self.after
        assert line is not None, "an example without an answer"
        return line


@dataclass(frozen=True)
class Examples:
    """Examples that are shown, those that changed most first; `counts` is over all of them."""

    shown: list[Example]
    counts: dict[Kind, int]
    figure: str
    paired: bool

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    def left_out(self) -> dict[Kind, int]:
        """How many are not shown, by kind."""
        shown = Counter(example.kind for example in self.shown)
        return {kind: n - shown[kind] for kind, n in self.counts.items() if n > shown[kind]}


def read_examples(
    before: Path | None, after: Path | None, headline: str | None, most: int
) -> Examples:
    """The samples of two files of answers, of which either may be missing, side by side."""
    both = list(pairs(before, after))
    figure = figure_of(headline, [line for pair in both for line in pair if line is not None])
    examples = [_judged(old, new, figure) for old, new in both]
    counts = Counter(example.kind for example in examples)
    return Examples(
        shown=_chosen(examples, most),
        counts={kind: counts[kind] for kind in KINDS},
        figure=figure,
        paired=before is not None and after is not None,
    )


def pairs(before: Path | None, after: Path | None) -> Iterator[tuple[Line | None, Line | None]]:
    """Lines of the same sample. The same id may come again, from another file of samples."""
    waiting: defaultdict[str, list[Line]] = defaultdict(list)
    for line in read_lines(before) if before else ():
        waiting[str(line.get("id"))].append(line)
    for line in read_lines(after) if after else ():
        same = waiting.get(str(line.get("id")))
        yield (same.pop(0) if same else None), line
    for rest in waiting.values():
        yield from ((line, None) for line in rest)


def figure_of(headline: str | None, lines: Sequence[Line]) -> str:
    """The score of each sample that says best what the headline says of all."""
    known = {name for line in lines for name in scores_of(line)}
    wanted = [BY_SAMPLE.get(headline, headline)] if headline else []
    return next((name for name in (*wanted, *STANDS_FOR) if name in known), "")


def scores_of(line: Line) -> dict[str, float]:
    """The finite figures of an answer."""
    scores = line.get("scores")
    return {
        str(name): float(value)
        for name, value in (scores.items() if isinstance(scores, dict) else ())
        if is_finite(value)
    }


def _judged(before: Line | None, after: Line | None, figure: str) -> Example:
    old, new = (scores_of(line).get(figure) if line else None for line in (before, after))
    change = new - old if old is not None and new is not None else 0.0
    full = FULL_MARKS.get(figure, 1.0)
    last = new if new is not None else old
    kind: Kind = "right" if last is not None and last >= full - LEAST else "wrong"
    if abs(change) > LEAST:
        kind = "better" if change > 0 else "worse"
    return Example(before, after, kind, change)


def _chosen(examples: Iterable[Example], most: int) -> list[Example]:
    """At most `most`: a quarter of the room for each kind, what is left over for the others, the
    greatest changes first."""
    waiting: dict[Kind, list[Example]] = {kind: [] for kind in KINDS}
    for example in examples:
        waiting[example.kind].append(example)
    for group in waiting.values():
        group.sort(key=lambda example: -abs(example.change))
    room = {kind: min(len(group), most // len(KINDS)) for kind, group in waiting.items()}
    for kind, group in waiting.items():
        room[kind] += min(len(group) - room[kind], most - sum(room.values()))
    return [example for kind, group in waiting.items() for example in group[: room[kind]]]


def pictures_of(line: Line) -> list[str]:
    """Paths of the pictures of a question."""
    image = line.get("image")
    paths: list[Any] = image if isinstance(image, list) else [image]
    return [path for path in paths if isinstance(path, str)]
