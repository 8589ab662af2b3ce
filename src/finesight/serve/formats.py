"""Image formats that the server accepts."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.data.headers import FORMATS
from finesight.errors import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Formats that are always accepted. Decoders of the others are slow or rarely fuzzed."""


def read_formats(more: Sequence[str]) -> tuple[str, ...]:
    """Read the names of further formats. Raises UserError for one that is not known."""
    names = tuple(name.upper().replace(" ", "") for name in more)
    others = [name for name in FORMATS if name not in IMAGE_FORMATS]
    for name in names:
        if name not in FORMATS:
            raise UserError(
                f"no image format {name!r:.40}",
                where="--image-format",
                expected=" or ".join(sorted(others)),
                remedy="correct the name, or leave it out",
            )
    return tuple(dict.fromkeys((*IMAGE_FORMATS, *names)))
