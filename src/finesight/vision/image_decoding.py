"""Decoding of image files to upright RGB images on a white background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.data.image_header import (
    MAX_IMAGE_PIXELS,
    CorruptImageError,
    TruncatedImageError,
    open_image_header,
    read_exif_orientation,
)

_EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose operation of each EXIF orientation (Exif 2.32, tag 0x0112)."""

_WHITE_RGBA = (255, 255, 255, 255)

MAX_BAND_PIXELS = 1 << 20
"""Maximum number of pixels per horizontal band in conversions of wide pixel types.

Conversion in bands limits the memory of 16-bit, 32-bit and floating-point intermediates.
"""


def load_image(
    path: Path, max_pixels: int = MAX_IMAGE_PIXELS, min_side: int | None = None
) -> Image.Image:
    """Load an image as RGB with EXIF rotation applied and transparency blended on white.

    16-bit grayscale is scaled to 8 bits. Animated images give their first frame. The number of
    pixels is checked before decoding.

    Args:
        min_side: Allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size with no side below this.
            The complete file is still validated.

    Raises:
        CorruptImageError: The file is missing, truncated, not an image, or too large.
    """
    with open_image_header(path, max_pixels) as image:
        try:
            exif_orientation = read_exif_orientation(image)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            rgb_image = _convert_to_rgb(image)
        except Exception as error:  # decoders raise various exceptions on corrupt data
            raise _build_corrupt_image_error(path, error) from error
    return (
        rgb_image.transpose(_EXIF_TRANSPOSES[exif_orientation])
        if exif_orientation in _EXIF_TRANSPOSES
        else rgb_image
    )


def _build_corrupt_image_error(path: Path, error: Exception) -> CorruptImageError:
    is_truncated = "truncated" in str(error) or isinstance(error, EOFError)
    error_class = TruncatedImageError if is_truncated else CorruptImageError
    return error_class(
        "truncated: the file ends within the image data" if is_truncated else f"corrupt ({error})",
        where=str(path),
        expected="a complete image file",
        remedy="download or export the image again, or remove it from the data",
    )


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _convert_in_bands(
            image, lambda band: _gray_to_rgb(_uint16_to_uint8(np.asarray(band)))
        )
    if image.mode in ("I", "F"):
        low, high = _get_value_range(image)
        return _convert_in_bands(
            image, lambda band: _gray_to_rgb(_rescale_to_uint8(_to_finite_array(band), low, high))
        )
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _convert_in_bands(image, _blend_on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_in_bands(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert an image in horizontal bands to limit the memory of wide intermediate types."""
    width, height = image.size
    band_rows = max(1, MAX_BAND_PIXELS // width)
    if band_rows >= height:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top in range(0, height, band_rows):
        result.paste(convert(image.crop((0, top, width, min(top + band_rows, height)))), (0, top))
    return result


def _blend_on_white(image: Image.Image) -> Image.Image:
    opaque = Image.new("RGBA", image.size, _WHITE_RGBA)
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


def _gray_to_rgb(values_HW: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(values_HW).convert("RGB")


def _uint16_to_uint8(values_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255 and round to nearest: 65535 = 255 x 257."""
    return ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_finite_array(image: Image.Image) -> NDArray[np.number]:
    values_HW: NDArray[np.number] = np.nan_to_num(np.asarray(image))
    return values_HW


def _get_value_range(image: Image.Image) -> tuple[float, float]:
    width, height = image.size
    band_rows = max(1, MAX_BAND_PIXELS // width)
    bands = (
        _to_finite_array(image.crop((0, top, width, min(top + band_rows, height))))
        for top in range(0, height, band_rows)
    )
    lows, highs = zip(*((float(band.min()), float(band.max())) for band in bands), strict=True)
    return min(lows), max(highs)


def _rescale_to_uint8(values_HW: NDArray[np.number], low: float, high: float) -> NDArray[np.uint8]:
    """Scale pixel values to 0..255.

    Integers within 16 bits and fractions within 0..1 use that range. Other images are normalized
    by their minimum and maximum.
    """
    is_integer = np.issubdtype(values_HW.dtype, np.integer)
    if is_integer and low >= 0 and high <= 65535:
        return _uint16_to_uint8(values_HW.astype(np.uint16))
    if not is_integer and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values_HW.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return np.rint(scaled).astype(np.uint8)
