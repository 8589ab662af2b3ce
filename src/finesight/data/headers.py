"""The size of a picture from its header alone, before any pixel is decoded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from finesight.data.inside import content
from finesight.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused: a 12 KB file can unpack to gigabytes (8000 x 8000 is the limit)."""

MAX_BYTES = 1 << 30
"""Larger files are refused: `MAX_PIXELS` of four 32-bit numbers, uncompressed, are as much."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are opened at all; Pillow's others can start programs (EPS) or hold no pixels.
JPEG comes first and includes MPO, the container of phone cameras."""

ORIENTATION = 0x0112
SIDEWAYS = frozenset({5, 6, 7, 8})
_TILE_WIDTH, _TILE_LENGTH = 322, 323
"""Of a TIFF: each tile is unpacked whole, however little of it lies inside of the picture."""

# The limit above is checked on every picture and refuses; Pillow's own is a warning above 89 Mpx.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DamagedPicture(UserError):
    """A picture that cannot be used: missing, no picture, cut off, or over the limit of pixels."""


class Missing(DamagedPicture):
    """A picture without a file."""


class CutOff(DamagedPicture):
    """A picture whose file ends before its pixels do."""


class TooLarge(DamagedPicture):
    """A picture over the limit of pixels."""


def open_header(
    path: Path, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """The picture at `path`, opened but not decoded: its size is as stored, before the EXIF turn.

    Raises DamagedPicture for a missing file, one of none of the formats and one over `max_pixels`.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe is to wait for ever
        raise DamagedPicture(
            "a folder" if os.path.isdir(path) else "a pipe or a device, not a file",
            where=str(path),
            expected="a picture's file",
            remedy="correct the path",
        )
    try:
        source = content(path)
        if isinstance(source, Path):
            _check_length(source)
        image = Image.open(source, formats=tuple(formats))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(
            "no such picture",
            where=str(path),
            expected="an existing file",
            remedy="correct the path; in a data file, a relative one starts at the file's folder",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more than 178 million", max_pixels) from error
    except UnidentifiedImageError as error:
        empty = (path.stat().st_size if isinstance(source, Path) else len(source.getbuffer())) == 0
        raise DamagedPicture(
            "an empty file" if empty else "not a picture",
            where=str(path),
            expected=f"one of {', '.join(formats)}",
            remedy="fetch or export the picture again, or leave it out",
        ) from error
    except DamagedPicture:
        raise
    except Exception as error:  # a broken header can raise nearly anything inside Pillow
        raise DamagedPicture(
            f"cannot be opened ({error})",
            where=str(path),
            expected="a readable picture",
            remedy="fetch or export the picture again, or leave it out",
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise _too_large(path, f"{width} x {height} = {width * height}", max_pixels)
    if isinstance(image, TiffImageFile) and _tile(image) > max_pixels:
        image.close()
        raise _too_large(path, f"tiles of {_tile(image)}", max_pixels)
    return image


def _check_length(path: Path) -> None:
    length = path.stat().st_size
    if length > MAX_BYTES:
        raise TooLarge(
            f"a file of {length} bytes",
            where=str(path),
            expected=f"at most {MAX_BYTES} bytes",
            remedy="save the picture compressed, or scale it down first",
        )


def _tile(image: TiffImageFile) -> int:
    """Pixels of one tile; 0 of a picture without."""
    sides = (image.tag_v2.get(_TILE_WIDTH, 0), image.tag_v2.get(_TILE_LENGTH, 0))
    width, length = (side if isinstance(side, int) else 0 for side in sides)
    return width * length


def orientation(image: Image.Image) -> int:
    """The EXIF turn (1 to 8, 1 is none) that a picture, opened and not yet decoded, still needs.

    For PNG, Pillow's own method decodes the whole picture to look for EXIF after the pixels;
    the base class's reads what the header held, which is what this package goes by everywhere.
    A TIFF needs none: Pillow reports its turned size and turns it when decoding.
    """
    if image.format == "TIFF":
        return 1
    value = Image.Image.getexif(image).get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def picture_size(
    path: Path, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """Height and width in pixels after the EXIF turn, from the header alone.

    Raises DamagedPicture for a missing file, one of none of the formats and one over `max_pixels`.
    """
    with open_header(path, max_pixels, formats) as image:
        width, height = image.size
        try:
            turned = orientation(image) in SIDEWAYS
        except Exception as error:  # EXIF that is not EXIF: struct, Syntax, Type and other errors
            raise DamagedPicture(
                f"its EXIF data cannot be read ({error})",
                where=str(path),
                expected="sound EXIF data, or none",
                remedy="save the picture again without metadata",
            ) from error
    return (width, height) if turned else (height, width)


def _too_large(path: Path, pixels: str, max_pixels: int) -> TooLarge:
    return TooLarge(
        f"{pixels} pixels",
        where=str(path),
        expected=f"at most {max_pixels} pixels",
        remedy="scale the picture down first",
    )
