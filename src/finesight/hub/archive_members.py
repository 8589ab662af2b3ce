"""Reading of archive headers with limits, and errors for corrupt archives.

Both extraction and the WebDataset reader open tar files with this module.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finesight.errors import UserError
from finesight.regular_file import open_regular_file

MAX_MEMBERS = 2_000_000

CHUNK_BYTES = 2**20
MAX_READ_BYTES = 16 * CHUNK_BYTES
"""Maximum number of bytes of a single read; a header has a few hundred."""

_CORRUPT_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, struct.error,
    # Exceptions of tarfile and zipfile for invalid numbers, names and header chains.
    ValueError, LookupError, OverflowError, RecursionError, NotImplementedError, MemoryError,
)  # fmt: skip
_NON_DISK_ERRNOS = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)

HeaderT = TypeVar("HeaderT")


@contextlib.contextmanager
def translate_archive_errors(archive: Path) -> Iterator[None]:
    """Convert exceptions that a corrupt archive causes to UserError.

    Disk errors, such as a full disk, are not converted.
    """
    try:
        yield
    except (*_CORRUPT_ERRORS, OSError) as error:
        # bz2 and gzip raise OSError without errno for invalid data.
        if isinstance(error, OSError) and error.errno not in _NON_DISK_ERRNOS:
            raise
        raise build_corrupt_archive_error(
            archive, f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def build_corrupt_archive_error(archive: Path, reason: str) -> UserError:
    """Build the UserError for an archive that cannot be read."""
    return UserError(
        f"cannot be read: {reason}",
        where=str(archive),
        expected="a complete zip or tar archive",
        remedy="download it again",
    )


def build_archive_limit_error(archive: Path, what: str, expected: str) -> UserError:
    """Build the UserError for an archive that exceeds a size or file limit."""
    return UserError(
        f"it would unpack to {what}; no files were kept",
        where=str(archive),
        expected=expected,
        remedy="use the archive only if you trust its author: unpack it yourself and use the"
        " folder",
    )


def iter_limited(archive: Path, headers: Iterable[HeaderT]) -> Iterator[HeaderT]:
    """Iterate over the headers of an archive, up to the maximum number of files.

    Raises:
        UserError: The archive has more than `MAX_MEMBERS` files, or a header is corrupt.
    """
    iterator = iter(headers)
    for _ in range(MAX_MEMBERS):
        with translate_archive_errors(archive):
            header = next(iterator, None)
        if header is None:
            return
        yield header
    raise build_archive_limit_error(
        archive, f"more than {MAX_MEMBERS} files", f"at most {MAX_MEMBERS} files"
    )


@dataclass(frozen=True, slots=True)
class TarArchive:
    """An open tar archive whose headers and files are read with limits."""

    archive: Path
    file: tarfile.TarFile

    def iter_headers(self) -> Iterator[tarfile.TarInfo]:
        """Iterate over the headers of the archive.

        Raises:
            UserError: A header is corrupt. This includes a negative size, with which tarfile would
                loop.
        """
        for header in iter_limited(self.archive, self.file):
            if header.size < 0:
                raise build_corrupt_archive_error(
                    self.archive, f"{header.name[:200]!r} has {header.size} bytes"
                )
            yield header

    def read_member(self, header: tarfile.TarInfo) -> bytes:
        """Return the content of one file in the archive.

        Raises:
            UserError: The file is truncated or cannot be read.
        """
        with translate_archive_errors(self.archive):
            content: bytes = self.open_member(header).read()
        if len(content) != header.size:
            raise build_corrupt_archive_error(self.archive, f"{header.name[:200]!r} is truncated")
        return content

    def open_member(self, header: tarfile.TarInfo) -> Any:
        """Open one file in the archive as a stream."""
        stream = self.file.extractfile(header)
        assert stream is not None, f"{header.name} is a regular file without content"
        return stream


class _BoundedReader(io.BufferedReader):
    """Buffered reader that rejects reads above `MAX_READ_BYTES`.

    A forged tar header can declare a name of any length, which tarfile would read into memory.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def open_tar(archive: Path, start: int = 0) -> Iterator[TarArchive]:
    """Open an uncompressed or compressed tar archive.

    Args:
        archive: Path of the archive.
        start: Byte offset of the first header to read, in the uncompressed archive.

    Raises:
        UserError: The file is not a tar archive.
    """
    openers: dict[str, Callable[..., Any]]
    openers = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with contextlib.ExitStack() as stack:
        with translate_archive_errors(archive):
            raw = stack.enter_context(open_regular_file(archive))
            opener = openers.get(archive.suffix.lower())
            reader = _BoundedReader(
                raw if opener is None else stack.enter_context(opener(raw, "rb"))
            )
            reader.seek(start)
            file = stack.enter_context(tarfile.open(fileobj=reader, mode="r:"))
        yield TarArchive(archive, file)
