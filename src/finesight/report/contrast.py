"""Figures of several runs with their intervals, and how sure the difference of each from the first
is: on the same held-out samples, by the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finesight.evaluate.answered import Scored, means
from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.compare import Difference, paired_scores, unsampled
from finesight.evaluate.score import LOWER_IS_BETTER, TASKS, score
from finesight.report.entries import Entry, Key, is_own, other_loss, shared
from finesight.report.figures import LOSS, Ends, Judged, ends_of, figures_of, interval_of, note_of


@dataclass(frozen=True)
class Cell(Judged):
    """A figure of one run; `difference` is that from the first run, where they can be compared."""

    value: float | None
    ends: Ends | None
    difference: Difference | None
    note: str = ""

    @property
    def change(self) -> float | None:
        """How much more than the first one's."""
        return None if self.difference is None else self.difference.after - self.difference.before


@dataclass(frozen=True)
class Row:
    """A figure of all runs."""

    name: str
    headline: bool
    cells: list[Cell]

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.name in LOWER_IS_BETTER


class Scoring:
    """Scores sets of answers, each set of each run once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[Key, ...]], Scored] = {}

    def of(self, entry: Entry, keys: Sequence[Key]) -> Scored | None:
        """Answers scored anew or, by a metric of the user's own, by the scores they have: None
        where these do not say the same of all."""
        name = entry.letter, tuple(keys)
        chosen = [entry.answers[key] for key in keys]
        if name not in self._known and chosen:
            task = next((task for task in TASKS if task == entry.metric), None)
            if task is not None and not is_own(entry.metric):
                self._known[name] = score(task, [one.case for one in chosen])
            elif len({frozenset(one.scores) for one in chosen}) == 1:
                each = [one.scores for one in chosen]
                self._known[name] = Scored(each, means(each, bounds=UNBOUNDED))
        return self._known.get(name)


def contrast(entries: Sequence[Entry]) -> list[Row]:
    """All figures of all entries, the headline first and the loss last."""
    scoring = Scoring()
    figures = [_figures(entry, scoring) for entry in entries]
    changes = [{}, *(_differences(entries[0], other, scoring) for other in entries[1:])]
    headlines = [str(entry.measured.get("headline") or "") for entry in entries]
    headline = next(filter(None, headlines), "")
    names = dict.fromkeys([headline, *(name for one in figures for name in one)])
    order = [name for name in names if name and name != LOSS]
    return [
        Row(
            name,
            name == headline,
            [
                _cell(one.get(name), change.get(name))
                for one, change in zip(figures, changes, strict=True)
            ],
        )
        for name in (*order, LOSS)
        if any(name in one for one in figures)
    ]


class _Figure(NamedTuple):
    """A score of a run with its interval; `note` says why it has none, or warns about the score."""

    value: float
    ends: Ends | None
    note: str


def _cell(figure: _Figure | None, change: Difference | None) -> Cell:
    value, ends, note = figure or (None, None, "")
    return Cell(value, ends, change, note)


def _figures(entry: Entry, scoring: Scoring) -> dict[str, _Figure]:
    """As the run has measured them; of a file of answers, as they are scored now."""
    if entry.record is not None:
        found = figures_of(entry.measured)
        return {
            name: _Figure(value, interval_of(entry.measured, name), note_of(entry.measured, name))
            for name, value in found.items()
        }
    scored = scoring.of(entry, list(entry.answers))
    if scored is None:
        return {}
    ends, notes = scored.intervals(), scored.notes()
    return {
        name: _Figure(value, ends_of(ends[name]), notes.get(name, ""))
        for name, value in scored.scores.items()
    }


def _differences(first: Entry, other: Entry, scoring: Scoring) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    keys, _ = shared(first, other)
    if first.metric == other.metric and keys:
        was, now = (scoring.of(entry, keys) for entry in (first, other))
        if was is not None and now is not None:
            found = {one.name: one for one in paired_scores(was, now)}
    losses = [figures_of(entry.measured).get(LOSS) for entry in (first, other)]
    if losses[0] is not None and losses[1] is not None and not other_loss(first, other):
        found[LOSS] = unsampled(LOSS, losses[0], losses[1])
    return found
