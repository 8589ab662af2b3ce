"""The same picture saved twice (another JPEG quality, another format, a mild resize).

Pictures are told apart in two steps: by thumbnails of 16 x 16 levels of grey, and side by side.
Forms, receipts and formulas pass the first in crowds. The second looks at every patch of 8 x 8
pixels: saving anew disturbs all patches with a texture a little, one character more or less
disturbs one patch a lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.vision.picture import open_picture

SIDE = 16
"""Pixels along a side of a thumbnail, whatever the picture's shape."""

Size = tuple[int, int]
Floats = NDArray[np.float64]

_GREY_APART, _CONTRAST_APART, _ASPECT_APART = 4.0, 0.5, 0.05
"""How far the thumbnails of two savings of a picture may differ: in levels of grey on average, and
these by the deviation of all levels in one of them; and the logarithms of width by height.
JPEG of quality 30 makes up to 2.4 levels, a resize to a half 2.8 (1,469 photographs, receipts and
formulas)."""

_PLAIN = 1.0
"""Pictures whose grey levels spread less show nothing to know them by."""

_DETAIL, _PATCH = 512, 8
"""Longest side in pixels at which two pictures are compared, and the side of a patch."""

_GREY = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in brightness (ITU-R BT.601)."""

_NEAR, _ODD = 0.58, 6.0
_FAR, _UNEVEN = 0.8, 3.5
"""The worst difference of a patch by its contrast, and the same by that of most patches. Savings
of one picture reach 0.54 and 5.4, or 3.6 if it is a photograph or a document; receipts and formulas
that share their thumbnail begin at 1.1; one exchanged character makes 0.6 and more, and 15 or,
after JPEG of quality 85 and 50, 7 and 4."""

_TINT, _SHIFT, _COARSE = 35.0, 2.5, 30.0
"""The difference of a patch's mean colour and of the whole picture's, in levels: JPEG rounds plain
colours by the more, the coarser it is, which the usual difference of the patches tells. Scenes that
differ in the shade of their background alone begin where this ends."""


def thumbnail(image: Image.Image) -> bytes:
    """The picture in 16 x 16 levels of grey, row by row."""
    return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()


def shows_something(thumbnail: bytes) -> bool:
    """Whether a thumbnail has any contrast: a blank page is not known by what it shows."""
    return bool(np.frombuffer(thumbnail, dtype=np.uint8).std() >= _PLAIN)


class Lookalikes:
    """An index of pictures, by thumbnail and size, that finds those which a picture may be."""

    def __init__(self, thumbnails: Sequence[bytes], sizes: Sequence[Size]) -> None:
        grey_NT = _as_array(thumbnails)
        brightness = grey_NT.mean(axis=1)
        self._order = np.argsort(brightness, kind="stable")
        self._brightness = brightness[self._order]
        self._grey = grey_NT[self._order]
        self._coarse = _coarse(self._grey)
        self._aspects = np.log([w / h for h, w in sizes] or [1.0])[self._order]

    def of(self, picture: bytes, size: Size) -> list[int]:
        """Places, in the lists given at the start, of pictures that look like this one, the
        nearest first. A picture without contrast looks like nothing."""
        if not shows_something(picture):
            return []
        grey_1T = _as_array([picture])
        apart = min(_GREY_APART, _CONTRAST_APART * float(grey_1T.std()))
        mean = float(grey_1T.mean())
        first, last = np.searchsorted(self._brightness, [mean - apart, mean + apart])
        near = np.arange(first, last)
        aspect = np.log(size[1] / size[0])
        near = near[np.abs(self._aspects[near] - aspect) <= _ASPECT_APART]
        # A mean of blocks differs by no more than what is in the blocks: nothing is lost here.
        near = near[_apart(self._coarse[near], _coarse(grey_1T)) <= apart]
        distance = _apart(self._grey[near], grey_1T)
        near, distance = near[distance <= apart], distance[distance <= apart]
        return [int(self._order[place]) for place in near[np.argsort(distance, kind="stable")]]


def _as_array(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    grey = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(-1, SIDE * SIDE)
    return grey.astype(np.float32)


def _coarse(grey_NT: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of 4 x 4 blocks of each thumbnail, [N, 16]."""
    blocks = grey_NT.reshape(-1, 4, SIDE // 4, 4, SIDE // 4)
    return np.asarray(blocks.mean(axis=(2, 4)).reshape(-1, 16))


def _apart(some: NDArray[np.float32], one: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean difference of each row of `some` from the only row of `one`."""
    return np.asarray(np.abs(some - one).mean(axis=1))


def same_picture(one: Path, other: Path) -> bool:
    """Whether both files show the same, patch by patch. Raises DamagedPicture."""
    pictures = _detailed(one), _detailed(other)
    width, height = (min(sides) for sides in zip(*(p.size for p in pictures), strict=True))
    first, second = (
        np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
        for picture in pictures
    )
    if first.std() < _PLAIN:
        return False
    grey, other_grey = first @ _GREY, second @ _GREY
    side = min(_PATCH, width, height)
    contrast = np.maximum(_spreads(grey, side), _spreads(other_grey, side))
    difference = _means(np.abs(grey - other_grey), side) / (contrast + 12)
    usual = float(np.quantile(difference[contrast >= min(20.0, contrast.max() / 2)], 0.75))
    worst = float(difference.max())
    uneven = worst / (usual + 0.04)
    if not (worst <= _NEAR and uneven <= _ODD) and not (worst <= _FAR and uneven <= _UNEVEN):
        return False
    colours = np.moveaxis(first - second, 2, 0)
    tint = np.abs(_means(colours, min(2 * _PATCH, width, height))).max()
    shift = np.abs(colours.mean(axis=(1, 2))).max()
    return bool(tint <= _TINT and shift <= _SHIFT + _COARSE * usual)


@lru_cache(64)
def _detailed(path: Path) -> Image.Image:
    picture = open_picture(path, at_least=_DETAIL)
    scale = min(1.0, _DETAIL / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _means(values_HW: Floats, side: int) -> Floats:
    """Means of all squares of `side` pixels, over the last two axes, by sums of everything above
    and left of each corner."""
    edges = [(0, 0)] * (values_HW.ndim - 2) + [(1, 0), (1, 0)]
    sums = np.pad(values_HW, edges).cumsum(axis=-2).cumsum(axis=-1)
    upper, lower = sums[..., :-side, :], sums[..., side:, :]
    inside = lower[..., side:] - lower[..., :-side] - upper[..., side:] + upper[..., :-side]
    return np.asarray(inside / side**2)


def _spreads(values_HW: Floats, side: int) -> Floats:
    """Standard deviations of all squares of `side` pixels."""
    means = _means(values_HW, side)
    return np.asarray(np.sqrt(np.maximum(_means(values_HW**2, side) - means**2, 0)))
