"""Pages of PDF files as images of Pillow, rendered by PDFium (extra `pdf`).

The resolution is fixed, so that boxes in pixels of a page fit in training, evaluation and serving.
Fonts that a file does not contain are replaced by fonts of the machine.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import pypdfium2
from PIL import Image, ImageFile

T = TypeVar("T")

PAGE_SCALE = 2.0
"""Pixels of a rendered page per point (1/72 inch): 144 dpi."""

MAX_PAGE_PIXELS = 1 << 24
"""Maximum number of pixels of a rendered page. A larger page is rendered at a smaller scale."""

# PDFium is not thread-safe. A fork waits until no thread uses it.
_LOCK = threading.Lock()
os.register_at_fork(
    before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
)


class PdfImageFile(ImageFile.ImageFile):
    """PDF file whose pages, with annotations and forms, are the frames of an image."""

    format, format_description = "PDF", "pages of a PDF file"

    def _open(self) -> None:
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
        self.n_frames, (width, height) = self._use_document(self._read_size)
        num_points = max(1.0, width) * max(1.0, height)
        self._scale = min(PAGE_SCALE, math.sqrt(MAX_PAGE_PIXELS / num_points))
        self._size = max(1, math.ceil(width * self._scale)), max(1, math.ceil(height * self._scale))

    def _read_size(self, document: Any) -> tuple[int, tuple[float, float]]:
        if self._page_index >= len(document):
            raise EOFError(f"page {self._page_index + 1} of {len(document)}")
        return len(document), document.get_page_size(self._page_index)

    def load(self) -> Any:
        """Render the page."""
        if self._im is None:
            self.im = self._use_document(self._render).im
        return super().load()

    def _render(self, document: Any) -> Image.Image:
        document.init_forms()  # draws the values of its fields
        options = {"rev_byteorder": True, "force_bitmap_format": pypdfium2.raw.FPDFBitmap_BGR}
        with (
            closing(document[self._page_index]) as page,
            closing(page.render(self._scale, **options)) as bitmap,
        ):
            image: Image.Image = bitmap.to_pil()
        if image.size != self._size:
            raise ValueError(f"a page of {image.size} instead of {self._size} pixels")
        return image

    def _use_document(self, use: Callable[[Any], T]) -> T:
        with _LOCK, closing(pypdfium2.PdfDocument(self.fp)) as document:
            return use(document)
