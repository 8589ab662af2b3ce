"""Two measurements of the same samples, side by side: what got better, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from finesight.config import Metric
from finesight.errors import UserError
from finesight.evaluate.answered import Case, Scored, note_lines
from finesight.evaluate.bootstrap import FEWEST, Estimator, differences, no_difference
from finesight.evaluate.proportions import Interval
from finesight.evaluate.saved import read_answers
from finesight.evaluate.score import LOWER_IS_BETTER, score

T = TypeVar("T")

Verdict = Literal["better", "worse", "no clear change"]

NOTHING = 5e-5
"""Of a figure: less is shown as 0.0000."""

ONE_SUM = "no interval: only the sum over all samples is known"
REMOVED = "no interval: the answers are gone"


@dataclass(frozen=True, slots=True)
class Difference:
    """A score before and after, with the 95 % interval of the difference (after - before).

    Attributes:
        low: Lower bound. None, as is `high`, where there is no interval.
        note: Why there is no interval, or a warning about the score.
    """

    name: str
    before: float
    after: float
    low: float | None
    high: float | None
    verdict: Verdict
    note: str = ""


def paired(metric: Metric, before: Sequence[Case], after: Sequence[Case]) -> list[Difference]:
    """Compare the scores of two sets of answers to the same samples.

    Answers are paired by the id of their sample, or one by one where ids repeat; samples that only
    one set answers are left out. Raises UserError when the sets share none.
    """
    old, new = _shared(before, after)
    if not old:
        raise UserError(
            f"{len(before)} answers before and {len(after)} after, and no sample in both",
            where="comparison",
            expected="answers to the same samples",
            remedy="measure both on the same data",
        )
    return paired_scores(score(metric, old), score(metric, new))


def paired_scores(was: Scored, now: Scored) -> list[Difference]:
    """Compare the scores of answers to the same samples in the same order."""
    return compare_estimators(was.estimators, now.estimators)


def compare_estimators(
    before: Mapping[str, Estimator], after: Mapping[str, Estimator]
) -> list[Difference]:
    """Compare the scores of the same samples in the same order."""
    found = []
    for name, interval in differences(before, after).items():
        was, now = before[name], after[name]
        low, high = interval or (None, None)
        verdict = _verdict(name, interval) if was.samples >= FEWEST else "no clear change"
        note = no_difference(was, now) or was.note
        found.append(Difference(name, was.score, now.score, low, high, verdict, note))
    return found


def paired_files(metric: Metric, before: Path, after: Path) -> list[Difference]:
    """`paired`, of two files of answers as an evaluation writes them."""
    old, new = read_answers(before), read_answers(after)
    return paired(metric, [one.case for one in old], [one.case for one in new])


def unsampled(name: str, before: float, after: float, note: str = ONE_SUM) -> Difference:
    """Compare a score without samples, such as the held-out loss: its verdict goes by its value."""
    gap = after - before
    return Difference(name, before, after, None, None, _verdict(name, Interval(gap, gap)), note)


def _verdict(name: str, interval: Interval | None) -> Verdict:
    """Clear if the interval lies on one side of 0, and is more than what is shown as none."""
    if interval is None or max(map(abs, interval)) < NOTHING:
        return "no clear change"
    low, high = interval
    if name in LOWER_IS_BETTER:
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "no clear change"


def as_table(differences: Sequence[Difference], headline: str | None = None) -> str:
    """A line for each figure; the one named `headline` is marked."""
    rows = [("score", "before", "after", "difference", "95 % interval", "")]
    for one in differences:
        mark = "*" if one.name == headline else ""
        figures = (f"{one.before:.4f}", f"{one.after:.4f}", f"{one.after - one.before:+.4f}")
        bounds = "" if one.low is None else f"{one.low:+.4f} to {one.high:+.4f}"
        rows.append((one.name + mark, *figures, bounds, one.verdict))
    return "\n".join([aligned(rows, 1), *note_lines({one.name: one.note for one in differences})])


def aligned(rows: Sequence[Sequence[str]], names: int) -> str:
    """Rows in columns: the first ones are `names` and begin together, figures end together, and the
    last column is as long as it is."""
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    sides = ["<" if number < names else ">" for number in range(len(widths))]
    return "\n".join(
        "  ".join(
            [
                *(
                    f"{text:{side}{width}}"
                    for text, side, width in zip(row[:-1], sides, widths, strict=True)
                ),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    )


def _shared(before: Sequence[Case], after: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """The answers to the samples that both sets answer, in the order of `before`."""
    old, new = (by_sample(cases, lambda case: case.id) for cases in (before, after))
    shared = [key for key in old if key in new]
    return [old[key] for key in shared], [new[key] for key in shared]


def by_sample(answers: Sequence[T], name: Callable[[T], str]) -> dict[tuple[str, int], T]:
    """Answers by the id of their sample, its `name`, and by how many of that id came before."""
    seen: Counter[str] = Counter()
    found = {}
    for one in answers:
        own = name(one)
        found[own, seen[own]] = one
        seen[own] += 1
    return found
