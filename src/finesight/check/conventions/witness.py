"""What the pictures say of a reading: do boxes know their own picture better than another one?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.edges import Sides, small_grey
from finesight.check.conventions.readings import Bools, Table
from finesight.data.headers import DamagedPicture

Floats = NDArray[np.float64]

Look = Callable[[Path], Sides]
"""Opens a picture for measuring. Raises DamagedPicture for one that cannot be."""

PICTURES = 300
"""Pictures that are looked at, evenly spread over the source: more say nothing new."""

BOXES = 1200
"""Boxes that are measured, at least 4 of a picture if it has so many."""

CONTROLS = 3
"""Other pictures that a box is held against."""

FEWEST = 20
"""Fewer pictures than these are no witness."""

ALIKE = 2.0
"""Mean difference of brightness (of 255) below which pictures look alike."""

CLOSE = 0.03
"""Share of the largest number by which boxes that lie alike differ at most."""

RARE = 1e-6
"""The chance of an accusation by accident that is put up with."""

MOST = 10.0
"""A single box counts at most so much, about twice the scatter of scores."""


def look_at(path: Path) -> Sides:
    """The usual Look: decode, shrink, sum up."""
    return Sides(small_grey(path))


class Witness:
    """Some pictures of a source, opened, and the claims about them: `rows` of the table."""

    def __init__(self, table: Table, look: Look, seed: int = 0) -> None:
        numbers = np.unique(np.linspace(0, len(table.paths) - 1, PICTURES).round().astype(int))
        # Neighbours in a file are often alike (frames of a video), and poor controls.
        np.random.default_rng(seed).shuffle(numbers)
        self._pictures: list[Sides] = []
        groups = []
        most = max(4, BOXES // len(numbers))
        for number in numbers:
            try:
                self._pictures.append(look(table.paths[number]))
            except DamagedPicture:
                continue  # a finding of its own
            own = np.flatnonzero(table.picture == number)
            groups.append(own[np.linspace(0, len(own) - 1, min(len(own), most)).astype(int)])
        self.rows = np.concatenate(groups) if groups else np.zeros(0, int)
        self.picture = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self._voice = self._voices(table)
        self.able = len(set(self._voice)) >= FEWEST

    def first(self, pictures: int) -> Witness:
        """The same with so many of the pictures, which lie in a random order."""
        smaller = copy.copy(self)
        smaller._pictures = self._pictures[:pictures]
        kept = self.picture < pictures
        smaller.rows, smaller.picture = self.rows[kept], self.picture[kept]
        smaller._voice = self._voice[:pictures]
        return smaller

    def _voices(self, table: Table) -> NDArray[np.int_]:
        """A number for each picture, the same for pictures that look alike and whose first boxes
        lie alike (frames of a video, scans of one form): together they have one vote."""
        first = np.searchsorted(self.picture, np.arange(len(self._pictures)))
        boxes = table.numbers[self.rows[first]]
        scale = np.abs(table.numbers).max(initial=1e-9)
        outlines = np.stack([sides.outline() for sides in self._pictures] or [np.zeros(1)])
        voices = np.arange(len(self._pictures))
        for number in range(1, len(voices)):
            alike = np.abs(outlines[:number] - outlines[number]).mean(axis=1) < ALIKE
            near = np.abs(boxes[:number] - boxes[number]).max(axis=1) < scale * CLOSE
            if (alike & near).any():
                voices[number] = voices[np.argmax(alike & near)]
        return voices

    def scores(self, boxes: Floats, controls: int = CONTROLS) -> Floats:
        """How much better boxes [n, R, 4] of R readings fit their own pictures than others:
        [n, R, 2], for the left and upper sides and for the right and lower ones.

        Boxes are shares, one for each of `rows`. The same boxes in `controls` other pictures are
        subtracted, so that whatever a reading owes to place, size and layout alone comes out as 0
        on average. NaN where a box is not inside its picture.
        """
        with np.errstate(invalid="ignore"):
            inside = (boxes > -0.01) & (boxes < 1.01)
            able: Bools = np.all(inside, axis=2)
            able &= np.all(boxes[..., 2:] > boxes[..., :2], axis=2)
        safe = np.where(able[..., None], boxes, np.array([0.0, 0.0, 1.0, 1.0]))
        own, other = np.zeros((2, *boxes.shape[:2], 2))
        total = len(self._pictures)
        starts = np.searchsorted(self.picture, np.arange(total + 1))
        members = [np.arange(starts[k], starts[k + 1]) for k in range(total)]
        for number, sides in enumerate(self._pictures):
            asked = [members[(number + step) % total] for step in range(controls + 1)]
            rows = np.concatenate(asked)
            measured = sides.measure(safe[rows].reshape(-1, 4)).reshape(len(rows), -1, 2)
            mine = len(asked[0])
            own[asked[0]] = measured[:mine]
            other[rows[mine:]] += measured[mine:]
        return np.where(able[..., None], own - other / controls, np.nan)

    def surprise(self, values: Floats, among: Bools | None = None) -> float:
        """How surely values [n] (or differences) of `rows` are above 0: z, see `chance`.

        The boxes of one picture, or of pictures that are alike, are added up first and divided by
        the root of their number: they are no independent votes, and many should not drown others.
        """
        kept = np.isfinite(values) if among is None else np.isfinite(values) & among
        votes = self._voice[self.picture[kept]]
        weights = 1 / np.sqrt(np.bincount(votes, minlength=len(self._pictures)).clip(1))
        worth = np.clip(values[kept], -MOST, MOST) * weights[votes]
        sums = np.bincount(votes, worth, len(self._pictures))
        return float(sums.sum() / math.sqrt(max(float((sums**2).sum()), 1e-12)))


def chance(z: float, tries: int = 1) -> float:
    """A bound of the chance of a sum of n differences, each as likely minus as plus, to reach `z`
    times the root of the sum of their squares: exp(-z^2 / 2), by Hoeffding (1963), for any n and
    any sizes. `tries` readings that were tried multiply it."""
    return min(1.0, tries * math.exp(-z * z / 2)) if z > 0 else 1.0


def needed(tries: int = 1) -> float:
    """The z at which `chance` falls to RARE."""
    return math.sqrt(2 * math.log(tries / RARE))
