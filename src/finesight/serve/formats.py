"""Image formats that the inference server accepts."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.data.image_header import IMAGE_FORMATS as DECODABLE_FORMATS
from finesight.errors import UserError

DEFAULT_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Image formats that are always accepted.

The decoders of other formats are slow or rarely fuzzed.
"""


def read_formats(more: Sequence[str]) -> tuple[str, ...]:
    """Return the default image formats and additional ones.

    Args:
        more: Names of additional formats (`--image-format`).

    Raises:
        UserError: A name is unknown.
    """
    names = tuple(name.upper().replace(" ", "") for name in more)
    others = [name for name in DECODABLE_FORMATS if name not in DEFAULT_IMAGE_FORMATS]
    for name in names:
        if name not in DECODABLE_FORMATS:
            raise UserError(
                f"unknown image format {name!r:.40}",
                where="--image-format",
                expected=" or ".join(sorted(others)),
                remedy="Correct the name or omit it.",
            )
    return tuple(dict.fromkeys((*DEFAULT_IMAGE_FORMATS, *names)))
