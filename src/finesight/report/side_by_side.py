"""The same held-out samples with the answers of several runs, those that they disagree on first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finesight.report.entries import Entry, shared
from finesight.report.examples import FULL_MARKS, LEAST, figure_of, scores_of
from finesight.report.formulas import Formulas
from finesight.report.gallery import Data, Gallery
from finesight.report.record import Line

Kind = Literal["differ", "wrong", "right"]
KINDS: tuple[Kind, ...] = ("differ", "wrong", "right")
"""The scores of a sample's answers differ, are all below full marks, or all at them."""

MOST = 600
"""Samples on a page: the answers of eight runs to them are some megabytes."""


@dataclass(frozen=True)
class Sample:
    """A held-out sample: the lines of its answers, None of a run that did not answer it, and their
    scores."""

    lines: list[Line | None]
    scores: list[float | None]
    kind: Kind
    spread: float

    @property
    def asked(self) -> Line:
        """A line of it: what was asked is the same in all."""
        return next(line for line in self.lines if line is not None)


@dataclass(frozen=True)
class Samples:
    """Samples that are shown; `counts` is over all of them, and `figure` the score that was
    compared, of which `full` is the most."""

    shown: list[Sample]
    counts: dict[Kind, int]
    figure: str
    full: float

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())


def samples_of(entries: Sequence[Entry], most: int = MOST) -> Samples:
    """The samples that the first run and at least one other answered."""
    first = entries[0]
    with_first = [set(first.answers), *(set(shared(first, other)[0]) for other in entries[1:])]
    wanted = [key for key in first.answers if any(key in keys for keys in with_first[1:])]
    rows = [
        [
            entry.answers[key].record if key in keys else None
            for entry, keys in zip(entries, with_first, strict=True)
        ]
        for key in wanted
    ]
    headline = first.measured.get("headline")
    figure = figure_of(
        headline if isinstance(headline, str) else None,
        [line for row in rows for line in row if line is not None],
    )
    full = FULL_MARKS.get(figure, 1.0)
    found = [_judged(row, figure, full) for row in rows]
    counts = Counter(one.kind for one in found)
    return Samples(_chosen(found, most), {kind: counts[kind] for kind in KINDS}, figure, full)


def _judged(lines: list[Line | None], figure: str, full: float) -> Sample:
    scores = [scores_of(line).get(figure) if line else None for line in lines]
    known = [score for score in scores if score is not None]
    spread = max(known, default=0.0) - min(known, default=0.0)
    kind: Kind = "right" if known and min(known) >= full - LEAST else "wrong"
    return Sample(lines, scores, "differ" if spread > LEAST else kind, spread)


def _chosen(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most `most`: half of the room for those that differ, a quarter for each other kind, what
    is left over for the rest; the greatest differences first."""
    groups = {kind: [one for one in samples if one.kind == kind] for kind in KINDS}
    groups["differ"].sort(key=lambda one: -one.spread)
    shares = {"differ": most // 2, "wrong": most // 4, "right": most // 4}
    room = {kind: min(len(group), shares[kind]) for kind, group in groups.items()}
    for kind, group in groups.items():
        room[kind] += min(len(group) - room[kind], most - sum(room.values()))
    return [one for kind, group in groups.items() for one in group[: room[kind]]]


def as_data(samples: Samples, folders: Sequence[Path], formulas: Formulas | None) -> Data:
    """`samples` with thumbnails, and the `pictures` that they name by number."""
    gallery = Gallery(folders, formulas)
    pictures, number = gallery.pictures(one.asked for one in samples.shown)
    return {
        "pictures": pictures,
        "examples": [
            {
                **gallery.asked(one.asked, number),
                "kind": one.kind,
                "answers": [gallery.answer(line) for line in one.lines],
                "marks": [None if mark is None else round(mark, 4) for mark in one.scores],
            }
            for one in samples.shown
        ],
    }
