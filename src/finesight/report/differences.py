"""How sure the differences of a run are that has not come to its end, by the scores it has noted.

At its end a run compares its answers anew; on the way that would cost too much for some metrics,
and a report runs no metric of the user's own. What is a mean over the samples needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finesight.evaluate.answered import together
from finesight.evaluate.bootstrap import Array, ratios, resampled
from finesight.evaluate.compare import Difference, difference
from finesight.report.examples import BY_SAMPLE, pairs, scores_of
from finesight.report.record import Line

CLOSE = 1e-6
"""A figure that differs by more from the mean of the samples' scores is none."""


def differences(
    before: Path, after: Path, then: Mapping[str, float], since: Mapping[str, float]
) -> dict[str, Difference]:
    """The differences of those figures that are means over the answers in two files, by paired
    bootstrap. `then` and `since` are the figures as the run has noted them."""
    both = [(old, new) for old, new in pairs(before, after) if old is not None and new is not None]
    changes: dict[str, Array] = {}
    if not both:
        return {}
    for name in then.keys() & since.keys():
        was, now = (_column(name, lines) for lines in zip(*both, strict=True))
        if was is None or now is None:
            continue
        if abs(was.mean() - then[name]) < CLOSE and abs(now.mean() - since[name]) < CLOSE:
            changes[name] = now - was
    ones = np.ones(len(both))
    figures = {name: ratios(change, ones) for name, change in changes.items()}
    drawn = resampled(len(both), together(figures)) if figures else {}
    return {
        name: difference(name, then[name], since[name], values, len(both))
        for name, values in drawn.items()
    }


def _column(figure: str, lines: tuple[Line, ...]) -> Array | None:
    """The score of every line that the figure is made of, if all have one."""
    if figure == "stopped":
        return np.array([float(line.get("stopped") is True) for line in lines])
    scores = [scores_of(line).get(BY_SAMPLE.get(figure, figure)) for line in lines]
    return None if None in scores else np.array(scores, np.float64)
