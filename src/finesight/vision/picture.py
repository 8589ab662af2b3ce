"""The one place where pixels are decoded: any picture becomes RGB bytes, upright, on white."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.data.headers import MAX_PIXELS, CutOff, DamagedPicture, open_header, orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for (Exif 2.32, tag 0x0112)."""

_WHITE = (255, 255, 255, 255)

BAND = 1 << 20
"""Pixels that are turned into RGB at a time, where that takes wider numbers."""


def open_picture(
    path: Path, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """The picture at `path` as RGB, turned as its EXIF data says, transparency laid on white.

    Greyscale of 16 bits is scaled to 8, not clipped; of an animated picture the first frame is
    taken. The number of pixels is checked before any is decoded. With `at_least`, a JPEG may come
    at a half, a quarter or an eighth of its size, no side below that: its file is read to the end
    all the same, in a fraction of the time. Raises DamagedPicture, which tells a missing file, one
    that is no picture, one over the limit and one cut off apart.
    """
    with open_header(path, max_pixels) as image:
        try:
            turn = orientation(image)
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            upright = _as_rgb(image)
        except Exception as error:  # decoders raise nearly anything on broken data
            raise _damaged(path, error) from error
    return upright.transpose(_TURNS[turn]) if turn in _TURNS else upright


def _damaged(path: Path, error: Exception) -> DamagedPicture:
    cut = "truncated" in str(error) or isinstance(error, EOFError)
    kind = CutOff if cut else DamagedPicture
    return kind(
        "cut off: the file ends before its picture does" if cut else f"damaged ({error})",
        where=str(path),
        expected="a whole picture",
        remedy="fetch or export the picture again, or take it out of the data",
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _in_bands(image, lambda band: _grey(_from_16_bits(np.asarray(band))))
    if image.mode in ("I", "F"):
        low, high = _range(image)
        return _in_bands(image, lambda band: _grey(_from_wide(_numbers(band), low, high)))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _in_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_bands(image: Image.Image, turned: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`turned` of the whole picture, some rows at a time: wide numbers between take no memory."""
    width, height = image.size
    rows = max(1, BAND // width)
    if rows >= height:
        return turned(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        whole.paste(turned(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    opaque = Image.new("RGBA", image.size, _WHITE)
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


def _grey(values_HW: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(values_HW).convert("RGB")


def _from_16_bits(values_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """0..65535 to 0..255, to the nearest: 65535 = 255 x 257."""
    return ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _numbers(image: Image.Image) -> NDArray[np.number]:
    numbers_HW: NDArray[np.number] = np.nan_to_num(np.asarray(image))
    return numbers_HW


def _range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest number."""
    width, height = image.size
    rows = max(1, BAND // width)
    bands = (
        _numbers(image.crop((0, top, width, min(top + rows, height))))
        for top in range(0, height, rows)
    )
    lows, highs = zip(*((float(band.min()), float(band.max())) for band in bands), strict=True)
    return min(lows), max(highs)


def _from_wide(values_HW: NDArray[np.number], low: float, high: float) -> NDArray[np.uint8]:
    """Numbers of a picture that has them from `low` to `high`: whole ones within 16 bits by that
    range, fractions within 0..1 by that one; other values name no white of their own, so the
    darkest becomes 0 and the brightest 255."""
    whole = np.issubdtype(values_HW.dtype, np.integer)
    if whole and low >= 0 and high <= 65535:
        return _from_16_bits(values_HW.astype(np.uint16))
    if not whole and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values_HW.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return np.rint(scaled).astype(np.uint8)
