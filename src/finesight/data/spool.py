"""A temporary file for what is made of the rows of a source before it is known where it goes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple, Self

from finesight.errors import UserError
from finesight.storage import explained

FREE_BYTES = 2**30
MOST_RATIO = 1000
"""Bytes out for one byte of a source, beyond `FREE_BYTES`: boxes of a thousand classes give 100."""


class Piece(NamedTuple):
    """Where a piece lies in a spool, in bytes."""

    start: int
    size: int


class Spool:
    """Pieces in a temporary file in `folder`, of which memory holds the places alone."""

    def __init__(self, folder: Path, source_bytes: int) -> None:
        self._folder = folder
        self._source_bytes = source_bytes
        self.end = 0

    def __enter__(self) -> Self:
        with explained(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=2**20)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, content: bytes) -> Piece:
        """Append a piece.

        Raises:
            UserError: The disk is full, or much more comes out of the source than went in.
        """
        piece = Piece(self.end, len(content))
        self.end += len(content)
        if self.end > max(FREE_BYTES, MOST_RATIO * self._source_bytes):
            raise UserError(
                f"over {self.end - 1:,} bytes of samples out of {self._source_bytes:,} bytes",
                where="the source",
                expected=f"no more than {MOST_RATIO} times its size",
                remedy="check that it is what it should be; shorten what repeats in each row,"
                " or import parts of it with --rows",
            )
        try:
            self._file.write(content)
        except OSError:
            with explained(self._folder):
                raise
        return piece

    def read(self, piece: Piece) -> bytes:
        """Return a piece; call `add` no more after this."""
        self._file.seek(piece.start)
        content: bytes = self._file.read(piece.size)
        assert len(content) == piece.size, f"{len(content)} bytes of {piece}"
        return content
