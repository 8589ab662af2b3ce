"""Numbers of lines of data files, from a bounded number of bytes per page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from finesight.files.bounded_files import open_regular_file

MAX_COUNTED_BYTES = 256 << 20
"""Maximum number of bytes that one page reads to count lines, of one file and of all files."""

CHUNK_BYTES = 1 << 20

SAMPLE_BYTES = 1 << 16
"""Number of bytes from which the lines of other files are estimated."""

MAX_KNOWN_FILES = 10_000


class LineCount(NamedTuple):
    """Number of lines of a file, rounded if it is an estimate."""

    number: int
    is_estimate: bool


class LineCounter:
    """Counts lines, and remembers those of files that have not changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], LineCount]] = {}
        self._bytes_left = 0

    def start_page(self) -> None:
        """Allow to read the bytes of one page."""
        self._bytes_left = MAX_COUNTED_BYTES

    def count(self, file: Path) -> LineCount:
        """Count the lines of a file, or estimate them beyond the bytes of the page.

        Raises OSError, and UserError for a special file.
        """
        with open_regular_file(file) as stream:
            state = os.fstat(stream.fileno())
            size, version = state.st_size, (state.st_mtime_ns, state.st_size)
            known = self._known.get(file)
            if known is not None and known[0] == version:
                return known[1]
            if size > self._bytes_left:
                sample = stream.read(SAMPLE_BYTES)
                estimate = sample.count(b"\n") * size / max(1, len(sample))
                counted = LineCount(_round(estimate), True)
            else:
                self._bytes_left -= size
                starts = range(0, size, CHUNK_BYTES)
                num_lines = sum(stream.read(CHUNK_BYTES).count(b"\n") for _ in starts)
                counted = LineCount(num_lines, False)
        # One of the next pages counts the lines of a smaller file.
        if not counted.is_estimate or size > MAX_COUNTED_BYTES:
            if len(self._known) >= MAX_KNOWN_FILES:
                self._known.clear()
            self._known[file] = version, counted
        return counted


def _round(number: float) -> int:
    """Round a number to two significant digits."""
    return int(float(f"{number:.1e}"))
