"""Open images on disk or in tar, Parquet and PDF files: header, pages and pixels.

`shard.tar/@1536+20480/0001.jpg` refers to 20,480 bytes of `shard.tar` from byte 1,536,
`part.parquet/@12/0001.jpg` to the image of this name in row 12 (1-based), and `scan.pdf#page=3` to
page 3 of a PDF or TIFF file (RFC 8118). Such a path is sufficient to read the image without
unpacking the container.

PDFium (extra `pdf`) renders the pages of PDF files. The resolution is fixed, so that boxes in
pixels of a page fit in training, evaluation and serving. Fonts that a file does not contain are
replaced by fonts of the machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import math
import os
import re
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from finesight.errors import UserError, format_count
from finesight.files.storage import sha256_file
from finesight.samples.frames import ImageSize
from finesight.samples.parquet_reader import read_parquet_image
from finesight.samples.sample import is_video_path

MAX_MEMBER_BYTES = 256 * 2**20
"""Maximum number of bytes of a file in a tar, read into memory at once."""

_MEMBER = re.compile(
    r"(?P<container>.+?)/@(?P<start>[0-9]{1,18})(?:\+(?P<size>[0-9]{1,18}))?/(?P<name>.+)",
    re.DOTALL,
)
"""Path of a tar member by its first byte and size, or of an image by its Parquet row."""

_PAGE = re.compile(r"(?P<container>.+)#page=(?P<page>[1-9][0-9]{0,5})", re.DOTALL)


def split_container_path(path: str) -> tuple[str, str]:
    """Split a path into its container file and the path or page inside it.

    The second part is empty for a path that is not inside a container.
    """
    return _split_at_container(path, _MEMBER.fullmatch(path) or _PAGE.fullmatch(path))


def split_page(path: str) -> tuple[str, str]:
    """Split a path into its document and the fragment of its page, "" without one."""
    return _split_at_container(path, _PAGE.fullmatch(path))


def _split_at_container(path: str, match: re.Match[str] | None) -> tuple[str, str]:
    if match is None:
        return path, ""
    return match["container"], path[match.end("container") :]


def is_container_path(path: Path) -> bool:
    """Return whether a path refers to an image inside a tar, Parquet or document file."""
    return split_container_path(str(path))[1] != "" and not path.exists()


def get_file(path: Path) -> Path:
    """Return the file on disk of an image: its own, or the tar, Parquet or document file."""
    if not is_container_path(path):
        return path
    container, _ = split_container_path(str(path))
    return Path(container)


def is_page(path: Path) -> bool:
    """Return whether a path refers to a page or a PDF file."""
    return split_page(path.name)[1] != "" or path.suffix.lower() == ".pdf"


def resolve_content(path: Path) -> Path | io.BytesIO:
    """Return the path of a regular file, or the bytes of a container member.

    The content of a page is that of its document.

    Raises:
        OSError: The container cannot be read, or ends before the end of the member.
    """
    document, page = split_page(str(path))
    if page and not path.exists():
        path = Path(document)
    match = _MEMBER.fullmatch(str(path))
    if match is None or path.exists():
        return path
    container = Path(match["container"])
    start = int(match["start"])
    if match["size"] is None:
        return io.BytesIO(read_parquet_image(container, start, match["name"]))
    return io.BytesIO(_read_range(container, start, int(match["size"])))


def sha256_content(path: Path) -> str:
    """Compute the SHA-256 of a file, container member, or document and page in hexadecimal."""
    document, page = split_page(str(path))
    if page and not path.exists():
        return hashlib.sha256(f"{sha256_content(Path(document))}{page}".encode()).hexdigest()
    content = resolve_content(path)
    if isinstance(content, Path):
        return sha256_file(content)
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _read_range(container: Path, start: int, size: int) -> bytes:
    if size > MAX_MEMBER_BYTES:
        raise OSError(f"{size} bytes, more than {MAX_MEMBER_BYTES}")
    with container.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{container.name} ends before byte {start + size}")
    return data


DEFAULT_SIZE: ImageSize = (1000, 1000)
"""Size of an unknown image whose coordinates are in thousandths."""

MAX_IMAGE_PIXELS = 64_000_000
"""Maximum number of pixels of an image (8000 x 8000).

Without a limit, a 12 KB file could decode to gigabytes.
"""

MAX_JPEG_SCANS = 100
"""Maximum number of scans of a JPEG, of which progressive ones have about ten.

Each scan processes all pixels, and a file of a megabyte may have 100,000.
"""

_HASH_ROWS = 256
"""Number of image rows that are converted and hashed at once."""

MAX_IMAGE_BYTES = 1 << 30
"""Maximum file size of an image: `MAX_IMAGE_PIXELS` uncompressed pixels of four 32-bit values."""

IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "HEIF",
    "PDF",
)
"""Accepted image formats, as named by Pillow. JPEG includes the MPO container of phone cameras.

HEIF (HEIC photos) and PDF require packages, which are imported for the first such file.
Other formats of Pillow are rejected: some start programs (EPS), others contain no pixels.
"""

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".jp2",
        ".avif",
        ".heic",
        ".heif",
        ".pdf",
    }
)

IMAGE_MAGICS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II": ".tif",
    b"MM": ".tif",
    b"%PDF": ".pdf",
}
"""Suffix of image files by their first bytes, for common formats."""

_HEIF_HEADER = re.compile(rb".{4}ftyp.{4,60}(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
"""Pattern of the first bytes of a HEIF file: its box `ftyp` with a HEIF brand."""

_PDF_MARK = b"%PDF-"

MAX_PDF_MARK_END = 1024
"""Number of first bytes of a PDF file that contain its mark (ISO 32000, annex H)."""

DOCUMENT_SUFFIXES = (".pdf", ".tif", ".tiff")
"""Suffixes of files whose pages are images."""

_DOCUMENT_FORMATS = ("PDF", "TIFF")

MAX_PAGES = 100
"""Maximum number of pages of a document in a sample."""

PageRanges = Sequence[tuple[int, int | None]]
"""First and last page of the selected pages, 1-based. None is the last page of the document."""

_DATA_URL = re.compile(
    r"\s*(?:data:(?:image/|video/|audio/|application/pdf)|image/[\w.+-]+;base64,)", re.IGNORECASE
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]++={0,2}\s*")

# Markers of segments with a length, and of the end. Compressed data contain FF 00 and restarts.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_START_OF_SCAN = b"\xda"
_END_OF_IMAGE = b"\xd9"
_MAX_JPEG_BYTES = 256 << 20

EXIF_ORIENTATION_TAG = 0x0112
TRANSPOSED_ORIENTATIONS = frozenset({5, 6, 7, 8})
_SUBFILE_TYPE = 254
_REDUCED_OR_MASK = 0b101
_TILE_WIDTH = 322
_TILE_LENGTH = 323
"""TIFF tags of the tile size.

Pillow decodes a tile completely even if the image covers only a small part of it.
"""

# Pillow warns above 89 megapixels. `MAX_IMAGE_PIXELS` is lower, and is compared with the size in
# the header before any pixels are decoded, so that the warning would only precede an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def find_image_suffix(data: bytes) -> str:
    """Return the suffix of an image file from its first bytes, "" for an unknown format."""
    if data[4:8] == b"ftyp":
        return ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    return next((suffix for magic, suffix in IMAGE_MAGICS.items() if data.startswith(magic)), "")


def is_base64_image(text: str) -> bool:
    """Return whether a text is an image in base64, without the header of a data URL.

    The URL-safe alphabet, line breaks and missing padding are accepted.
    """
    head = "".join(text[:100].split())[:32]
    return (
        len(head) == 32
        and _BASE64.fullmatch(text) is not None
        and find_image_suffix(base64.b64decode(head, altchars=b"-_")) != ""
    )


def is_image_value(value: object, suffixes: Collection[str] = IMAGE_SUFFIXES) -> bool:
    """Return whether a value is an embedded image, the name of an image, or a list of them.

    Args:
        suffixes: Suffixes of file names. With those of videos, any bytes are accepted.
    """
    if isinstance(value, list | tuple):
        return bool(value) and all(is_image_value(one, suffixes) for one in value)
    if isinstance(value, dict):
        names = value.get("path"), value.get("url")
        is_named = any(is_image_value(name, suffixes) for name in names)
        return is_named or isinstance(value.get("bytes"), bytes)
    if isinstance(value, bytes):
        return suffixes is not IMAGE_SUFFIXES or find_image_suffix(value) != ""
    if not isinstance(value, str):
        return False
    path = value
    if "://" in value:
        path = re.split("[?#]", value, maxsplit=1)[0]
    document, _ = split_page(path)
    return PurePath(document).suffix.lower() in suffixes or is_embedded_media(value)


def is_embedded_media(text: str) -> bool:
    """Return whether a text is an image in base64, or the data URL of an image, video or audio."""
    return _DATA_URL.match(text) is not None or is_base64_image(text)


class CorruptImageError(UserError):
    """Raised when an image cannot be used: missing, not an image, truncated, or too large."""


class MissingImageError(CorruptImageError):
    """Raised when the file of an image does not exist."""


class TruncatedImageError(CorruptImageError):
    """Raised when an image file ends before its pixel data."""


class ImageTooLargeError(CorruptImageError):
    """Raised when an image exceeds the limit of pixels or bytes."""


def open_image_header(
    path: Path,
    max_pixels: int = MAX_IMAGE_PIXELS,
    formats: Sequence[str] = IMAGE_FORMATS,
    *,
    with_page: bool = True,
) -> Image.Image:
    """Open an image without decoding its pixels.

    The size of the returned image is the stored size, before EXIF rotation.

    Args:
        with_page: Select the page of the path; otherwise open the first one.

    Raises:
        CorruptImageError: The file is missing, has none of the accepted formats, or has more than
            `max_pixels` pixels.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe blocks
        what = "a folder" if os.path.isdir(path) else "a pipe or a device, not a file"
        raise build_file_error(path, what, "an image file", "correct the path")
    try:
        source = resolve_content(path)
        if isinstance(source, Path):
            num_bytes = source.stat().st_size
            if num_bytes > MAX_IMAGE_BYTES:
                what = f"a file of {num_bytes} bytes"
                expected = f"at most {MAX_IMAGE_BYTES} bytes"
                remedy = "compress or downscale the image"
                raise build_file_error(path, what, expected, remedy, ImageTooLargeError)
        else:
            num_bytes = len(source.getbuffer())
        image = _open_image(path, source, formats)
        if with_page:
            _select_page(path, image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise build_file_error(path, error_class=MissingImageError) from error
    except Image.DecompressionBombError as error:
        raise _build_too_large_error(path, "more than 178 million", max_pixels) from error
    except UnidentifiedImageError as error:
        what = "an empty file"
        remedy = ""
        if num_bytes:
            what = "not an image"
            remedy = "correct the path, or download the image again"
        raise build_file_error(path, what, f"one of {', '.join(formats)}", remedy) from error
    except CorruptImageError:
        raise
    except Exception as error:  # Pillow raises many error types
        raise build_file_error(path, f"cannot be opened ({error})", "a readable image") from error
    width, height = image.size
    num_tile_pixels = _count_tile_pixels(image) if isinstance(image, TiffImageFile) else 0
    if max(width * height, num_tile_pixels) > max_pixels:
        image.close()
        size = f"{width} x {height} = {width * height}"
        found = size if width * height > max_pixels else f"tiles of {num_tile_pixels}"
        raise _build_too_large_error(path, found, max_pixels)
    return image


def read_jpeg_size(content: bytes) -> ImageSize | None:
    """Return height and width in the header of a JPEG image; None for other content."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return image.height, image.width
    except Exception:  # invalid headers raise many types
        return None


def _open_image(path: Path, source: Path | io.BytesIO, formats: Sequence[str]) -> Image.Image:
    """Open an image with Pillow. Raises CorruptImageError if HEIF or PDF needs its package."""
    try:
        Image.init()
        return Image.open(source, formats=[name for name in formats if name in Image.OPEN])
    except UnidentifiedImageError:
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(MAX_PDF_MARK_END)
        else:
            head = source.getvalue()[:MAX_PDF_MARK_END]
        is_pdf = "PDF" in formats and _PDF_MARK in head
        is_heif = "HEIF" in formats and _HEIF_HEADER.match(head) and "HEIF" not in Image.OPEN
        if not (is_pdf or is_heif):
            raise
    try:
        if is_pdf:
            import pypdfium2  # noqa: F401

            return PdfImageFile(source)
        from pillow_heif import register_heif_opener
    except ImportError as error:
        if is_pdf:
            kind = "a PDF file"
            package = "pypdfium2"
            extra = "pdf"
        else:
            kind = "a HEIC image"
            package = "pillow-heif"
            extra = "heif"
        raise build_file_error(
            path,
            f"{kind}, but {error}",
            f"the package {package}, which decodes it",
            f"install it: pip install 'finesight[{extra}]'; or convert the images to JPEG",
        ) from error
    register_heif_opener()
    return Image.open(source, formats=("HEIF",))


PAGE_SCALE = 2.0
"""Pixels of a rendered page per point (1/72 inch): 144 dpi."""

MAX_PAGE_PIXELS = 1 << 24
"""Maximum number of pixels of a rendered page. A larger page is rendered at a smaller scale."""

# PDFium is not thread-safe. A fork waits until no thread uses it.
_PDF_LOCK = threading.Lock()
os.register_at_fork(
    before=_PDF_LOCK.acquire, after_in_parent=_PDF_LOCK.release, after_in_child=_PDF_LOCK.release
)


class PdfImageFile(ImageFile.ImageFile):
    """PDF file whose pages, with annotations and forms, are the frames of an image."""

    format = "PDF"
    format_description = "pages of a PDF file"

    def _open(self) -> None:
        import pypdfium2

        self._mode = "RGB"
        try:
            self.seek(0)
        except pypdfium2.PdfiumError as error:
            problem = "a damaged PDF file, or one without pages"
            if error.err_code in (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY):
                problem = "an encrypted PDF file: save it without a password"
            raise ValueError(f"error {error.err_code}: {problem}") from error

    def seek(self, frame: int) -> None:
        """Select a page, counted from 0. Raises EOFError if there is none."""
        self._page_index = frame
        with self._open_document() as document:
            self.n_frames = len(document)
            if frame >= self.n_frames:
                raise EOFError(f"page {frame + 1} of {self.n_frames}")
            width, height = document.get_page_size(frame)
        num_points = max(1.0, width) * max(1.0, height)
        self._scale = min(PAGE_SCALE, math.sqrt(MAX_PAGE_PIXELS / num_points))
        self._size = max(1, math.ceil(width * self._scale)), max(1, math.ceil(height * self._scale))

    def load(self) -> Any:
        """Render the page."""
        if self._im is None:
            with self._open_document() as document:
                self.im = self._render(document).im
        return super().load()

    def _render(self, document: Any) -> Image.Image:
        import pypdfium2

        document.init_forms()  # draws the values of its fields
        options = {"rev_byteorder": True, "force_bitmap_format": pypdfium2.raw.FPDFBitmap_BGR}
        with (
            contextlib.closing(document[self._page_index]) as page,
            contextlib.closing(page.render(self._scale, **options)) as bitmap,
        ):
            image: Image.Image = bitmap.to_pil()
        if image.size != self._size:
            raise ValueError(f"a page of {image.size} instead of {self._size} pixels")
        return image

    @contextlib.contextmanager
    def _open_document(self) -> Iterator[Any]:
        import pypdfium2

        with _PDF_LOCK:
            # A failed load resets the error code, which PDFium keeps from an earlier document.
            pypdfium2.raw.FPDF_LoadMemDocument(None, 0, None)
            with contextlib.closing(pypdfium2.PdfDocument(self.fp)) as document:
                yield document


def _select_page(path: Path, image: Image.Image) -> None:
    """Select the page of a path. A PDF file with several pages requires one."""
    match = None if path.exists() else _PAGE.fullmatch(str(path))
    num_pages = 1
    if image.format == "PDF" or (match and image.format in _DOCUMENT_FORMATS):
        num_pages = image.n_frames  # type: ignore[attr-defined]
    page = 1 if match is None else int(match["page"])
    if page > num_pages or (match is None and num_pages > 1):
        image.close()
        what = format_count(num_pages, "page")
        expected = f"one of the pages, such as {path.name.partition('#')[0]}#page={num_pages}"
        remedy = "name a page in the path; imports also select pages with --pages"
        raise build_file_error(path, what, expected, remedy)
    if page > 1:
        image.seek(page - 1)


def list_pages(
    path: Path, ranges: PageRanges = (), formats: Sequence[str] = IMAGE_FORMATS
) -> list[Path]:
    """Return the pages of a document, or the path alone without several pages.

    Reduced copies of an image in a TIFF file are not pages. A path with a page is returned alone.

    Args:
        ranges: Selected pages; empty for all. They do not apply to other images.

    Raises:
        CorruptImageError: The document cannot be opened, or has none of the selected pages.
        UserError: There are more than `MAX_PAGES` pages.
    """
    suffix = path.suffix.lower()
    is_image = suffix in IMAGE_SUFFIXES and suffix not in DOCUMENT_SUFFIXES
    if is_image or is_video_path(path) or split_page(str(path))[1]:
        return [path]
    with open_image_header(path, formats=formats, with_page=False) as image:
        num_pages = 1
        if image.format in _DOCUMENT_FORMATS:
            num_pages = image.n_frames  # type: ignore[attr-defined]
        numbers = list(range(1, num_pages + 1))
        if isinstance(image, TiffImageFile) and num_pages > 1:
            numbers = [n for n in numbers if not _is_reduced_copy(image, n)] or [1]
    selected = numbers
    if ranges:
        selected = [n for n in numbers if any(first <= n <= (last or n) for first, last in ranges)]
    if not 0 < len(selected) <= MAX_PAGES:
        raise build_file_error(
            path,
            f"{len(selected)} of its {format_count(len(numbers), 'page')} are selected",
            f"1 to {MAX_PAGES} pages in a sample",
            "select others with --pages, such as --pages 1-10",
        )
    if numbers == [1]:
        return [path]
    return [Path(f"{path}#page={n}") for n in selected]


def save_page(path: Path, target: Path | io.BytesIO) -> None:
    """Write a page of a document as PNG, with unchanged pixels if possible."""
    with open_image_header(path) as image:
        try:
            if image.mode in ("1", "L", "LA", "P", "I;16", "RGB", "RGBA"):
                image.save(target, format="PNG")
            else:
                image.convert("RGB").save(target, format="PNG")
        except Exception as error:  # decoders raise various exceptions on corrupt data
            raise build_corrupt_error(path, error) from error


def _is_reduced_copy(image: TiffImageFile, number: int) -> bool:
    image.seek(number - 1)
    subfile_type = image.tag_v2.get(_SUBFILE_TYPE, 0)
    return isinstance(subfile_type, int) and bool(subfile_type & _REDUCED_OR_MASK)


PixelKey = tuple[ImageSize, bytes]
"""Key that is equal for images with equal pixels, in any format and with any metadata.

It consists of height and width after EXIF rotation, and the SHA-256 of the pixels.
"""


def decode_image(
    path: Path, *, with_key: bool = False, max_key_side: int | None = None
) -> tuple[bool, PixelKey | None]:
    """Decode an image completely, to find truncated and equal ones.

    Args:
        max_key_side: Maximum side of the grid of pixels that the key contains; None for all pixels.
            With a grid, images with unequal keys differ, but others may differ, too.

    Returns:
        Whether it has further frames, and its key if requested.

    Raises:
        CorruptImageError: The file is truncated or corrupt.
    """
    with open_image_header(path) as image:
        check_scans(path, image)
        try:
            image.load()
            key = None
            if with_key:
                key = _hash_pixels(image, max_key_side)
        except Exception as error:  # decoders raise various exceptions on corrupt data
            raise build_corrupt_error(path, error) from error
        # The further images of an MPO file are previews and depth maps.
        if image.format not in ("MPO", *_DOCUMENT_FORMATS):
            with contextlib.suppress(Exception):
                image.seek(1)
                return True, key
    return False, key


def check_scans(path: Path, image: Image.Image) -> None:
    """Raise CorruptImageError for a JPEG with too many scans, before its pixels are decoded."""
    if image.format not in ("JPEG", "MPO"):
        return
    file = image.fp  # type: ignore[attr-defined]
    if file is None:
        return
    try:
        position = file.tell()
        file.seek(0)
        num_scans = _count_scans(file.read(_MAX_JPEG_BYTES))
        file.seek(position)
    except OSError as error:
        raise build_corrupt_error(path, error) from error
    if num_scans > MAX_JPEG_SCANS:
        raise build_file_error(
            path,
            f"a JPEG with {num_scans} scans",
            f"at most {MAX_JPEG_SCANS} scans",
            "save the image again as JPEG or PNG",
        )


def _count_scans(data: bytes) -> int:
    """Return the number of scans of the first image in a JPEG file.

    Segments are skipped, since they may contain thumbnails. The end of the image may precede other
    data, such as the video of a motion photo.
    """
    num_scans = 0
    position = 0
    while marker := _JPEG_MARKER.search(data, position):
        position = marker.end()
        if marker[1] == _END_OF_IMAGE:
            break
        if marker[1] == _START_OF_SCAN:
            num_scans += 1
        position += int.from_bytes(data[position : position + 2], "big")
    return num_scans


def _hash_pixels(image: Image.Image, max_side: int | None) -> PixelKey:
    """Hash the pixels of a decoded image, in bands to limit the memory of conversions."""
    if read_exif_orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    size = (image.height, image.width)
    digest = hashlib.sha256()
    if max_side is not None:
        grid = min(image.width, max_side), min(image.height, max_side)
        image = image.resize(grid, Image.Resampling.NEAREST)
    for top in range(0, image.height, _HASH_ROWS):
        band = image.crop((0, top, image.width, min(top + _HASH_ROWS, image.height)))
        if band.has_transparency_data:  # as in training, transparent pixels are white
            white = Image.new("RGBA", band.size, "white")
            band = Image.alpha_composite(white, band.convert("RGBA"))
        # Pixels of 16 and 32 bits have several byte orders in files.
        mode = band.mode[0] if band.mode[0] in "IF" else "RGB"
        digest.update(band.convert(mode).tobytes())
    return size, digest.digest()


def build_corrupt_error(path: Path, error: Exception) -> CorruptImageError:
    """Build the error of an image whose decoder failed: truncated or corrupt."""
    expected = "a complete image file"
    if "truncated" in str(error) or isinstance(error, EOFError):
        what = "truncated: the file ends within the image data"
        return build_file_error(path, what, expected, error_class=TruncatedImageError)
    return build_file_error(path, f"corrupt ({error})", expected)


def build_file_error(
    path: Path,
    what: str = "",
    expected: str = "an existing file",
    remedy: str = "",
    error_class: type[CorruptImageError] = CorruptImageError,
) -> CorruptImageError:
    """Build the error of an image or video file, without arguments that of a missing one."""
    if is_video_path(path):
        verb = "encode"
        kind = "video"
    else:
        verb = "export"
        kind = "image"
    if not what:
        what = f"no such {kind}"
        remedy = "correct the path; relative paths in data files start at their folder"
    remedy = remedy or f"download or {verb} the {kind} again, or remove it from the data"
    return error_class(what, where=str(path), expected=expected, remedy=remedy)


def _build_too_large_error(path: Path, pixels: str, max_pixels: int) -> CorruptImageError:
    return build_file_error(
        path,
        f"{pixels} pixels",
        f"at most {max_pixels} pixels",
        "downscale the image",
        ImageTooLargeError,
    )


def _count_tile_pixels(image: TiffImageFile) -> int:
    """Return the number of pixels per tile of a TIFF image, 0 without tiles."""
    width = image.tag_v2.get(_TILE_WIDTH, 0)
    length = image.tag_v2.get(_TILE_LENGTH, 0)
    if isinstance(width, int) and isinstance(length, int):
        return width * length
    return 0


def read_exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation to apply to an image, 1 (no rotation) to 8.

    Only the header is read. The `getexif` override of Pillow's PNG class is bypassed, because it
    decodes the full image to find EXIF data after the pixels. For TIFF the result is 1, because
    Pillow rotates TIFF images when it decodes them.
    """
    if image.format == "TIFF":
        return 1
    value = Image.Image.getexif(image).get(EXIF_ORIENTATION_TAG, 1)
    return value if value in range(1, 9) else 1


def read_image_size(
    path: Path, max_pixels: int = MAX_IMAGE_PIXELS, formats: Sequence[str] = IMAGE_FORMATS
) -> tuple[int, int]:
    """Read height and width of an image in pixels, after EXIF rotation, from its header.

    Raises:
        CorruptImageError: The file is missing, has none of the accepted formats, has invalid EXIF
            data, or has more than `max_pixels` pixels.
    """
    with open_image_header(path, max_pixels, formats) as image:
        width, height = image.size
        try:
            is_transposed = read_exif_orientation(image) in TRANSPOSED_ORIENTATIONS
        except Exception as error:  # invalid EXIF raises many types
            raise build_file_error(
                path,
                f"its EXIF data cannot be read ({error})",
                "valid EXIF data, or none",
                "save the image again without metadata",
            ) from error
    if is_transposed:
        return width, height
    return height, width


def is_image_file(path: Path) -> bool:
    """Return whether a file exists and has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def list_images(path: Path) -> list[Path]:
    """Return an image, or the images in a folder and its subfolders, without hidden ones."""
    files = filter(is_image_file, path.rglob("*") if path.is_dir() else [path])
    named = {one: one.relative_to(path).parts for one in files}
    return sorted(one for one, parts in named.items() if not any(part[0] == "." for part in parts))
