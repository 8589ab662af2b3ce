"""What the four numbers of a box may mean: their order, and the frame they are measured in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finesight.data.boxes import ROUNDING, BoxForm, BoxFormat

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SLACK = 0.003
"""Share of a side that a box may stand out of its picture, beside the pixel for rounding."""


PIXEL_CORNERS = BoxForm()


@dataclass(frozen=True, slots=True)
class Claim:
    """One box as its file has it: four numbers, in whatever convention, about one picture.

    `size` is (height, width) after the EXIF turn, `orientation` the EXIF turn itself (1 is none),
    `form` how the numbers are read now.
    """

    place: str
    sample_id: str
    picture: Path
    size: tuple[int, int]
    orientation: int
    numbers: tuple[float, float, float, float]
    form: BoxForm = PIXEL_CORNERS


class Table:
    """Claims as arrays: `numbers` [N, 4], `width`, `height`, `turn`, `sample` and `picture` [N]."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.form = claims[0].form
        self.numbers = np.array([claim.numbers for claim in claims], np.float64)
        self.height, self.width = np.array([claim.size for claim in claims], np.float64).T
        self.turn = np.array([claim.orientation for claim in claims])
        self.paths = list(dict.fromkeys(claim.picture for claim in claims))
        pictures = {path: number for number, path in enumerate(self.paths)}
        self.picture = np.array([pictures[claim.picture] for claim in claims])
        keys = [(claim.place, claim.sample_id) for claim in claims]
        samples = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.sample = np.array([samples[key] for key in keys])
        self.samples = len(samples)

    def __len__(self) -> int:
        return len(self.numbers)

    def samples_with(self, rows: Bools) -> int:
        """In how many samples there is such a box."""
        return len(np.unique(self.sample[rows]))


Base = Literal["picture", "stored", "fixed", "factor", "longest", "shortest", "pixels"]


@dataclass(frozen=True, slots=True)
class Frame:
    """The width and height that a box's numbers are measured in.

    picture: the picture's own, after the EXIF turn. stored: the same before the turn. fixed:
    `across` x `down` for all pictures. factor: `across` times the picture's own. longest,
    shortest, pixels: a copy of the same shape whose longest side, shortest side or root of the
    number of pixels is `across`; `capped`: smaller pictures were left as they are. Both sides come
    to multiples of `grid`, as Qwen2-VL's image processor makes them: down in a smaller copy, up in
    a larger one, else to the nearest.
    """

    base: Base = "picture"
    across: float = 1.0
    down: float = 1.0
    capped: bool = False
    grid: int = 1

    def sides(self, width: Floats, height: Floats) -> tuple[Floats, Floats]:
        """Width and height of the frame for pictures of such sizes."""
        if self.base == "fixed":
            return np.full_like(width, self.across), np.full_like(height, self.down)
        factor = self.across / copied_side(self.base, width, height)
        if self.capped:
            factor = np.minimum(factor, 1.0)
        if self.grid == 1:
            return width * factor, height * factor
        return self._gridded(width, factor), self._gridded(height, factor)

    def _gridded(self, side: Floats, factor: Floats) -> Floats:
        cells = side * factor / self.grid
        nearest = np.where(factor > 1, np.ceil(cells), np.rint(cells))
        return self.grid * np.maximum(np.where(factor < 1, np.floor(cells), nearest), 1.0)


def copied_side(base: Base, width: Floats, height: Floats) -> Floats:
    """What a copy of a picture is made by: the side (or mean side) that a Frame's `across` sets."""
    if base == "longest":
        return np.maximum(width, height)
    if base == "shortest":
        return np.minimum(width, height)
    return np.sqrt(width * height) if base == "pixels" else np.ones_like(width)


@dataclass(frozen=True, slots=True)
class Reading:
    """One meaning of the numbers: what they are, and in which frame."""

    format: BoxFormat
    frame: Frame = Frame()

    def shares(self, table: Table) -> Floats:
        """The boxes [N, 4]: two corners, as shares of the upright picture."""
        corners = corners_of(self.format, table.numbers)
        if self.frame.base != "stored":
            across, down = self.frame.sides(table.width, table.height)
            return corners / np.stack((across, down, across, down), axis=1)
        sideways = table.turn >= 5
        across = np.where(sideways, table.height, table.width)
        down = np.where(sideways, table.width, table.height)
        return turned(corners / np.stack((across, down, across, down), axis=1), table.turn)


def reading_of(form: BoxForm) -> Reading:
    """The reading that a BoxForm stands for."""
    whole = 1.0 if form.units == "pixel" else float(form.units)
    base: Base = "picture" if form.units == "pixel" else "fixed"
    return Reading(form.format, Frame(base, whole, whole))


def corners_of(format: BoxFormat, numbers: Floats) -> Floats:
    """Two corners [..., 4] of boxes in a format, in the numbers' own units."""
    first, last = numbers[..., :2], numbers[..., 2:]
    if format == "xywh":
        return np.concatenate((first, first + last), axis=-1)
    if format == "cxcywh":
        return np.concatenate((first - last / 2, first + last / 2), axis=-1)
    return numbers


def turned(boxes: Floats, turn: NDArray[np.int_]) -> Floats:
    """Boxes [N, 4] of stored pictures as they lie after the EXIF turn (Exif 2.32, tag 0x0112).

    All are shares of the sides, so that the sizes play no part.
    """
    x1, y1, x2, y2 = boxes.T
    # 5 to 8 swap the axes; then 2, 3, 7 and 6 count from the right, 3, 4, 7 and 8 from below.
    swap = turn >= 5
    x1, y1, x2, y2 = (
        np.where(swap, one, other) for one, other in ((y1, x1), (x1, y1), (y2, x2), (x2, y2))
    )
    right, below = np.isin(turn, (2, 3, 6, 7)), np.isin(turn, (3, 4, 7, 8))
    x1, x2 = np.where(right, 1 - x2, x1), np.where(right, 1 - x1, x2)
    y1, y2 = np.where(below, 1 - y2, y1), np.where(below, 1 - y1, y2)
    return np.stack((x1, y1, x2, y2), axis=1)


def reversed_or_empty(boxes: Floats) -> Bools:
    """Boxes [..., 4] whose corners are not in order, or whose numbers are none."""
    in_order = (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])
    return ~(in_order & np.isfinite(boxes).all(axis=-1))


def impossible(boxes: Floats, table: Table) -> Bools:
    """Boxes [N, 4] (shares) that are reversed, outside of their picture, or below a pixel."""
    sides = np.stack((table.width, table.height, table.width, table.height), axis=1)
    slack = ROUNDING / sides + SLACK
    outside = ((boxes < -slack) | (boxes > 1 + slack)).any(axis=1)
    pixels = boxes * sides
    speck = (pixels[:, 2] - pixels[:, 0] < 1) & (pixels[:, 3] - pixels[:, 1] < 1)
    found: Bools = reversed_or_empty(boxes) | outside | speck
    return found


def overlap(one: Floats, other: Floats) -> Floats:
    """Intersection over union [N] of boxes [N, 4] and [N, 4]."""
    least = np.maximum(one[:, :2], other[:, :2])
    most = np.minimum(one[:, 2:], other[:, 2:])
    common = np.clip(most - least, 0, None).prod(axis=1)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (one, other)]
    shares: Floats = common / np.maximum(areas[0] + areas[1] - common, 1e-12)
    return shares
