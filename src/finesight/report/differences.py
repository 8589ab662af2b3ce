"""How sure the differences of a run are that has not come to its end, by the scores it has noted.

At its end a run compares its answers anew; on the way that would cost too much for some metrics,
and a report runs no metric of the user's own. What is a mean over the samples needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finesight.evaluate.bootstrap import BOUNDED, UNBOUNDED, Array, Estimator, mean
from finesight.evaluate.compare import Difference, compare_estimators
from finesight.report.examples import BY_SAMPLE, pairs, scores_of
from finesight.report.record import Line

CLOSE = 1e-6
"""A figure that differs by more from the mean of the samples' scores is none."""


def differences(
    before: Path, after: Path, then: Mapping[str, float], since: Mapping[str, float]
) -> dict[str, Difference]:
    """Compare those scores that are means over the answers in two files.

    `then` and `since` are the scores as the run has noted them.
    """
    both = [(old, new) for old, new in pairs(before, after) if old is not None and new is not None]
    old_means: dict[str, Estimator] = {}
    new_means: dict[str, Estimator] = {}
    if not both:
        return {}
    for name in then.keys() & since.keys():
        was, now = (_column(name, lines) for lines in zip(*both, strict=True))
        if was is None or now is None:
            continue
        if abs(was.mean() - then[name]) < CLOSE and abs(now.mean() - since[name]) < CLOSE:
            bounds = BOUNDED if _within(was) and _within(now) else UNBOUNDED
            old_means[name], new_means[name] = mean(was, bounds), mean(now, bounds)
    return {one.name: one for one in compare_estimators(old_means, new_means)}


def _within(values: Array) -> bool:
    """Whether values can be those of a score between 0 and 1."""
    return bool(((values >= 0) & (values <= 1)).all())


def _column(figure: str, lines: tuple[Line, ...]) -> Array | None:
    """The score of every line that the figure is made of, if all have one."""
    if figure == "stopped":
        return np.array([float(line.get("stopped") is True) for line in lines])
    scores = [scores_of(line).get(BY_SAMPLE.get(figure, figure)) for line in lines]
    return None if None in scores else np.array(scores, np.float64)
