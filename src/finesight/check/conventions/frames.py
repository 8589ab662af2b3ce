"""The size of the copy that boxes were measured on: searched for, as only the pictures tell it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.readings import (
    Base,
    Frame,
    Reading,
    Table,
    copied_side,
    corners_of,
)
from finesight.check.conventions.witness import MOST, Witness
from finesight.data.boxes import BoxFormat

Floats = NDArray[np.float64]

STEP = 1.03
"""From one size that is tried to the next."""

FINE = 1.005
"""The same around the best ones."""

WIDEST = 2.6
"""Sizes are tried from where all boxes just fit to so many times that; in a copy that is larger
still, all boxes would crowd into one corner."""

ROUGHLY = 150
"""Pictures that the first steps are tried on."""

OUTLIERS = 0.01
"""Share of the boxes that need not fit."""

Kind = tuple[Base, bool, int]
"""What a copy is made by, whether it is capped, and the grid of its sides (see Frame)."""

KINDS: tuple[Kind, ...] = (
    ("factor", False, 1),
    ("longest", False, 1),
    ("shortest", False, 1),
    ("pixels", False, 1),
    ("longest", True, 1),
    ("pixels", True, 1),
    ("pixels", False, 28),
    ("pixels", True, 28),
)
"""The ways of making copies that keep a picture's shape, or nearly."""

SURER = 3.0
"""The z by which a less simple frame has to be the better one."""


@dataclass(frozen=True)
class Found:
    """The frame that fits the pictures best, as a reading, and how many were tried."""

    reading: Reading
    tries: int


def find_frame(table: Table, witness: Witness, format: BoxFormat) -> Found:
    """The frame in which boxes of this format fit their pictures best.

    First sizes in steps of 3 %, then finer around the best of each kind. Which kind it is matters
    only where pictures differ in size; of those that fit alike the simplest is taken.
    """
    rough = _Search(table, witness.first(ROUGHLY), format)
    coarse = rough.fixed() + rough.shaped()
    values = _means(rough.scores(coarse, controls=1))
    starts = [frame for group in _by_kind(coarse, values) for frame in group]
    fine = [frame for start in starts for frame in _around(start)]
    scores = _Search(table, witness, format).scores(fine)
    best = [_top(kind, scores) for kind in _kinds(fine)]
    chosen = best[0]
    for index in best[1:]:
        if witness.surprise(scores[:, index] - scores[:, chosen]) > SURER:
            chosen = index
    return Found(Reading(format, fine[chosen]), len(coarse) + len(fine))


class _Search:
    def __init__(self, table: Table, witness: Witness, format: BoxFormat) -> None:
        rows = witness.rows
        self._witness = witness
        self._corners = corners_of(format, table.numbers[rows])
        self._width, self._height = table.width[rows], table.height[rows]
        every = corners_of(format, table.numbers)
        self._x, self._y = every[:, 2], every[:, 3]
        self._table = table
        sizes = np.stack((table.width, table.height), axis=1)
        self._one_size = len(np.unique(sizes, axis=0)) == 1

    def fixed(self) -> list[Frame]:
        """Frames of one size for all pictures."""
        across, down = (_sizes(_reach(reach)) for reach in (self._x, self._y))
        return [Frame("fixed", x, y) for x, y in itertools.product(across, down)]

    def shaped(self) -> list[Frame]:
        """Frames of the pictures' own shapes; of pictures of one size they are nothing new."""
        if self._one_size:
            return []
        table, frames = self._table, []
        share = np.maximum(self._x / table.width, self._y / table.height)
        for base, capped, grid in KINDS:
            if capped and _reach(share) > 1.01:
                continue
            need = share * copied_side(base, table.width, table.height)
            frames += [Frame(base, size, size, capped, grid) for size in _sizes(_reach(need))]
        return frames

    def scores(self, frames: Sequence[Frame], controls: int = 3) -> Floats:
        """The witness's scores [n, R] of the claims read in each frame, all sides together."""
        boxes = np.empty((len(self._corners), len(frames), 4))
        for number, frame in enumerate(frames):
            across, down = frame.sides(self._width, self._height)
            boxes[:, number] = self._corners / np.stack((across, down, across, down), axis=1)
        scores: Floats = self._witness.scores(boxes, controls).sum(axis=2)
        return scores


def _means(scores: Floats) -> Floats:
    clipped = np.clip(scores, -MOST, MOST)
    able = np.isfinite(clipped)
    means = np.where(able, clipped, 0).sum(axis=0) / np.maximum(able.sum(axis=0), 1)
    return np.where(able.mean(axis=0) > 1 - 3 * OUTLIERS, means, -np.inf)


def _reach(values: Floats) -> float:
    return max(float(np.quantile(values, 1 - OUTLIERS)), 1e-3)


def _sizes(least: float) -> list[float]:
    steps = math.ceil(math.log(WIDEST) / math.log(STEP))
    return [0.99 * least * STEP**step for step in range(steps)]


def _kinds(frames: Sequence[Frame]) -> list[list[int]]:
    """Places of the frames of each kind, the simplest kind first."""
    order: list[Kind] = [KINDS[0], KINDS[1], ("fixed", False, 1), *KINDS[2:]]
    groups = [
        [n for n, f in enumerate(frames) if (f.base, f.capped, f.grid) == kind] for kind in order
    ]
    return [group for group in groups if group]


def _by_kind(frames: Sequence[Frame], values: Floats) -> list[list[Frame]]:
    """The best few frames of each kind."""
    few = 3
    groups = [sorted(group, key=lambda n: -values[n])[:few] for group in _kinds(frames)]
    return [[frames[n] for n in group] for group in groups]


def _around(frame: Frame) -> list[Frame]:
    steps = [FINE**step for step in range(-3, 4)]
    if frame.base != "fixed":
        return [replace(frame, across=frame.across * s, down=frame.down * s) for s in steps]
    pairs = itertools.product(steps, steps)
    return [replace(frame, across=frame.across * x, down=frame.down * y) for x, y in pairs]


def _top(group: Sequence[int], scores: Floats) -> int:
    means = _means(scores[:, list(group)])
    return group[int(np.argmax(means))]
