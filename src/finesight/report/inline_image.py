"""Embed images in HTML pages as data URLs."""

from __future__ import annotations

import base64
import io
from typing import TypedDict

from PIL import Image

JPEG_QUALITY = 88
"""Default JPEG quality of embedded images."""

MAX_PNG_COLORS = 4096
"""Maximum number of colors for which PNG is tried.

PNG of images with more colors would be slow to encode and larger than JPEG.
"""


class InlineImage(TypedDict):
    """Embedded image, the argument of `drawImage` in `base.js`.

    Attributes:
        src: Data URL, possibly of a smaller version of the image.
        width: Width of the original image, to which boxes refer.
        height: Height of the original image.
    """

    src: str
    width: int
    height: int


def build_inline_image(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> InlineImage:
    """Embed an RGB image, shrunk to sides of at most `max_side`.

    The width and height of the result are those of the original image, to which boxes refer.
    """
    data_url = encode_data_url(image, max_side, quality)
    return InlineImage(src=data_url, width=image.width, height=image.height)


def encode_data_url(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> str:
    """Encode an RGB image as a data URL, in PNG or JPEG, whichever is smaller.

    Larger images are shrunk to sides of at most `max_side`.
    """
    assert image.mode == "RGB", f"image mode is {image.mode}, not RGB"
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    image_format, encoded = "jpeg", _encode_image(image, "JPEG", quality=quality)
    if image.getcolors(MAX_PNG_COLORS) is not None:
        png = _encode_image(image, "PNG")
        image_format, encoded = (
            ("png", png) if len(png) <= len(encoded) else (image_format, encoded)
        )
    return f"data:image/{image_format};base64,{base64.b64encode(encoded).decode()}"


def _encode_image(image: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
