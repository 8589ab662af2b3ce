"""Temporary storage for encoded samples during an import.

Samples are assigned to output files only after all rows are parsed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple, Self

from finesight.errors import UserError
from finesight.storage import translate_os_errors

FREE_BYTES = 2**30
MAX_EXPANSION_RATIO = 1000
"""Maximum ratio of spooled bytes to source bytes, applied beyond `FREE_BYTES`.

Valid datasets, such as boxes with a thousand classes, reach a ratio of 100.
"""


class SpoolSpan(NamedTuple):
    """Byte range of one encoded sample in the spool."""

    start: int
    size: int


class Spool:
    """Temporary file of encoded samples. Callers keep only their byte ranges in memory.

    Args:
        folder: Folder of the temporary file.
        source_bytes: Size of the source in bytes, which limits the size of the spool.
    """

    def __init__(self, folder: Path, source_bytes: int) -> None:
        self._folder = folder
        self._source_bytes = source_bytes
        self.end = 0

    def __enter__(self) -> Self:
        with translate_os_errors(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=2**20)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, content: bytes) -> SpoolSpan:
        """Append an encoded sample and return its byte range.

        Raises:
            UserError: The disk is full, or the output is much larger than the source.
        """
        span = SpoolSpan(self.end, len(content))
        self.end += len(content)
        if self.end > max(FREE_BYTES, MAX_EXPANSION_RATIO * self._source_bytes):
            raise UserError(
                f"over {self.end - 1:,} bytes of samples out of {self._source_bytes:,} bytes",
                where="the source",
                expected=f"no more than {MAX_EXPANSION_RATIO} times its size",
                remedy="check the source; shorten what repeats in each row,"
                " or import parts of it with --rows",
            )
        try:
            self._file.write(content)
        except OSError:
            with translate_os_errors(self._folder):
                raise
        return span

    def read(self, span: SpoolSpan) -> bytes:
        """Return the bytes of a span. After the first read, `add` must not be called."""
        self._file.seek(span.start)
        content: bytes = self._file.read(span.size)
        assert len(content) == span.size, f"{len(content)} bytes of {span}"
        return content
