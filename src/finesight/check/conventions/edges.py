"""How well boxes stand on what a picture shows: the contrast across their sides.

Of each side three things are measured on a small grey copy of the picture: how much a strip just
inside differs in brightness from a strip just outside, how much busier it is, and how strong an
edge runs along the side itself. Objects and lines of text begin and end at the sides of their
boxes, so all three are larger there than at sides that lie anywhere. No model is involved.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finesight.data.headers import open_header
from finesight.vision.picture import open_picture

SIDE = 448
"""Pixels of the longer side of the small copies; words of 12 pixels in 1000 are still seen."""

WEIGHTS = np.array([5.0, 3.3, 1.7])
"""Of brightness step, busyness step and edge: one over how widely each scatters over photographs
and documents, about."""

STRIP = 4
"""A strip is one such part of the box's shorter side wide, and at least 2 pixels."""

CELLS = 16
"""Cells along a side by which pictures are known to be alike."""

_BUSIEST = 60
"""Differences between neighbouring pixels above this count as this."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Sums = NDArray[np.int32]


def small_grey(path: Path) -> NDArray[np.uint8]:
    """An upright grey copy of a picture, its longer side at most SIDE.

    Raises DamagedPicture for a file that cannot be decoded.
    """
    with open_header(path) as image:
        if image.format in ("JPEG", "MPO") and min(image.size) > SIDE:
            # The decoder itself can halve a JPEG, which makes large photographs quick.
            image.draft("L", (SIDE, SIDE))
            try:
                return _shrunk(ImageOps.exif_transpose(image).convert("L"))
            except OSError:
                pass  # what is wrong with it is for the one place that says so
    return _shrunk(open_picture(path).convert("L"))


def _shrunk(image: Image.Image) -> NDArray[np.uint8]:
    longest = max(image.size)
    if longest > SIDE:
        width, height = (max(1, round(side * SIDE / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image)


class Sides:
    """What one grey copy shows, kept in a byte a pixel; sums over it make the measures of any box a
    few look-ups. They take four times as much, so that each measuring makes its own."""

    def __init__(self, grey_HW: NDArray[np.uint8]) -> None:
        grey = grey_HW.astype(np.int32)
        self._height, self._width = grey.shape
        across, down = np.zeros_like(grey), np.zeros_like(grey)
        across[:, 1:] = np.abs(np.diff(grey, axis=1))
        down[1:] = np.abs(np.diff(grey, axis=0))
        busy = np.minimum(across + down, _BUSIEST)
        self._spread = float(grey.std()) + 1.0
        self._busy_mean = float(busy.mean()) + 0.5
        self._across_mean = float(across.mean()) + 0.3
        self._down_mean = float(down.mean()) + 0.3
        self._grey, self._busy = grey_HW, busy.astype(np.uint8)
        # An edge may run a pixel beside its side: the strongest of three neighbours counts.
        self._across = _strongest(across.T).astype(np.uint8)
        self._down = _strongest(down).astype(np.uint8)

    def measure(self, boxes: Floats) -> Floats:
        """Scores [N, 2] of boxes [N, 4] (two corners, as shares of the picture): of their left and
        upper sides, and of their right and lower sides.

        Sides that lie on the picture's own border are left out; with both left out it is 0.
        """
        x1, y1, x2, y2 = self._corners(boxes)
        strip = np.maximum(2, np.minimum(x2 - x1, y2 - y1) // STRIP)
        left, top = np.maximum(x1 - strip, 0), np.maximum(y1 - strip, 0)
        right = np.minimum(x2 + strip, self._width)
        bottom = np.minimum(y2 + strip, self._height)
        inner = (x1 + strip).clip(max=x2), (x2 - strip).clip(min=x1)
        middle = (y1 + strip).clip(max=y2), (y2 - strip).clip(min=y1)
        across, down = _along(self._across), _along(self._down)
        sides = (
            ((x1, y1, inner[0], y2), (left, y1, x1, y2), self._edge_at(across, x1, y1, y2)),
            ((x1, y1, x2, middle[0]), (x1, top, x2, y1), self._edge_below(down, y1, x1, x2)),
            ((inner[1], y1, x2, y2), (x2, y1, right, y2), self._edge_at(across, x2, y1, y2)),
            ((x1, middle[1], x2, y2), (x1, y2, x2, bottom), self._edge_below(down, y2, x1, x2)),
        )
        grey, busy = _summed(self._grey), _summed(self._busy)
        visible = np.stack((x1 > 0, y1 > 0, x2 < self._width, y2 < self._height))
        scores = np.empty((4, len(boxes)))
        for number, (inside, outside, edge) in enumerate(sides):
            steps = self._steps(grey, busy, inside, outside)
            scores[number] = np.stack((*steps, edge), axis=1) @ WEIGHTS
        pairs = np.where(visible, scores, 0.0).reshape(2, 2, -1).sum(axis=1)
        means: Floats = pairs / np.maximum(visible.reshape(2, 2, -1).sum(axis=1), 1)
        return means.T

    def outline(self) -> Floats:
        """Mean brightness (0 to 255) in the CELLS by CELLS cells of the picture, in one row."""
        across = np.linspace(0, self._width, CELLS + 1).astype(np.int64)
        down = np.linspace(0, self._height, CELLS + 1).astype(np.int64)
        y1, x1 = (grid.ravel() for grid in np.meshgrid(down[:-1], across[:-1], indexing="ij"))
        y2, x2 = (grid.ravel() for grid in np.meshgrid(down[1:], across[1:], indexing="ij"))
        box = x1, y1, x2, y2
        means: Floats = self._sum(_summed(self._grey), box) / _area(box)
        return means

    def _corners(self, boxes: Floats) -> tuple[Ints, Ints, Ints, Ints]:
        """Corners on the copy's pixels, every box at least two pixels wide and high."""
        scale = np.array([self._width, self._height, self._width, self._height])
        x1, y1, x2, y2 = np.rint(boxes * scale).astype(np.int64).T
        x1, y1 = x1.clip(0, max(self._width - 2, 0)), y1.clip(0, max(self._height - 2, 0))
        x2 = np.minimum(np.maximum(x2, x1 + 2), self._width)
        y2 = np.minimum(np.maximum(y2, y1 + 2), self._height)
        return x1, y1, x2, y2

    def _steps(
        self, grey: Sums, busy: Sums, inside: tuple[Ints, ...], outside: tuple[Ints, ...]
    ) -> tuple[Floats, Floats]:
        """Between two strips: the step in brightness, and that in busyness as a logarithm."""
        area_in, area_out = _area(inside), _area(outside)
        step = self._sum(grey, inside) / area_in - self._sum(grey, outside) / area_out
        floor = 0.1 * self._busy_mean
        busy_in = self._sum(busy, inside) / area_in + floor
        busy_out = self._sum(busy, outside) / area_out + floor
        return np.abs(step) / self._spread, np.log(busy_in / busy_out)

    def _sum(self, table: Sums, box: tuple[Ints, ...]) -> Ints:
        x1, y1, x2, y2 = box
        row = self._width + 1
        above, below = y1 * row, y2 * row
        lower = table[below + x2] - table[below + x1]
        sums: Ints = lower - table[above + x2] + table[above + x1]
        return sums

    def _edge_at(self, across: Sums, x: Ints, y1: Ints, y2: Ints) -> Floats:
        """The strength of the edge along a vertical side, against the picture's mean."""
        at = x.clip(max=self._width - 1) * (self._height + 1)
        mean = (across[at + y2] - across[at + y1]) / np.maximum(y2 - y1, 1)
        edge: Floats = np.log(mean / self._across_mean + 0.3)
        return edge

    def _edge_below(self, down: Sums, y: Ints, x1: Ints, x2: Ints) -> Floats:
        """The same of a horizontal side."""
        at = y.clip(max=self._height - 1) * (self._width + 1)
        mean = (down[at + x2] - down[at + x1]) / np.maximum(x2 - x1, 1)
        edge: Floats = np.log(mean / self._down_mean + 0.3)
        return edge


def _summed(values: NDArray[np.uint8]) -> Sums:
    """Sums over everything above and left of each corner of a pixel, in one row."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1), np.int32)
    np.cumsum(values, axis=0, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table.ravel()


def _along(values: NDArray[np.uint8]) -> Sums:
    """Sums along each row, a zero before them, all in one row."""
    table = np.zeros((values.shape[0], values.shape[1] + 1), np.int32)
    np.cumsum(values, axis=1, dtype=np.int32, out=table[:, 1:])
    return table.ravel()


def _strongest(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Each value, or that of the row above or below if it is larger."""
    best = values.copy()
    np.maximum(best[1:], values[:-1], out=best[1:])
    np.maximum(best[:-1], values[1:], out=best[:-1])
    return best


def _area(box: tuple[Ints, ...]) -> Ints:
    x1, y1, x2, y2 = box
    return np.maximum((x2 - x1) * (y2 - y1), 1)
