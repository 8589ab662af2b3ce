"""What archives say of their members, read with care: counted, forwards, and damage in words.

Every tar is opened here, whether it is unpacked or read as rows.
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
from finesight.regular_file import open_regular

MOST_MEMBERS = 2_000_000

PIECE = 2**20
LARGEST_SIP = 16 * PIECE
"""Bytes that are taken at once; headers have a few hundred."""

_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, struct.error,
    # What tarfile and zipfile make of numbers, names and chains of headers that are none.
    ValueError, LookupError, OverflowError, RecursionError, NotImplementedError, MemoryError,
)  # fmt: skip
_NO_ERRORS_OF_THE_DISK = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)

Header = TypeVar("Header")


@contextlib.contextmanager
def intact(archive: Path) -> Iterator[None]:
    """Turn what is raised in the block because of a damaged archive into a UserError."""
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        # bz2 and gzip raise OSError without a number for what they cannot read.
        if isinstance(error, OSError) and error.errno not in _NO_ERRORS_OF_THE_DISK:
            raise
        raise damaged(archive, f"{type(error).__name__}: {str(error)[:200]}") from error


def damaged(archive: Path, problem: str) -> UserError:
    """The error for an archive that cannot be read."""
    return UserError(
        f"cannot be read: {problem}",
        where=str(archive),
        expected="a whole zip or tar archive",
        remedy="fetch it again",
    )


def too_much(archive: Path, what: str, expected: str) -> UserError:
    """The error for an archive out of which more would come than is reasonable."""
    return UserError(
        f"{what} would come out of it; nothing was kept",
        where=str(archive),
        expected=expected,
        remedy="do not use it unless you know who made it; then unpack it yourself and give"
        " the folder",
    )


def counted(archive: Path, headers: Iterable[Header]) -> Iterator[Header]:
    """The headers of an archive, of files, folders and all else. Raises UserError after too many,
    and for damage that shows as they are read."""
    following = iter(headers)
    for _ in range(MOST_MEMBERS):
        with intact(archive):
            header = next(following, None)
        if header is None:
            return
        yield header
    raise too_much(archive, f"over {MOST_MEMBERS} files", f"at most {MOST_MEMBERS} files")


@dataclass(frozen=True, slots=True)
class Tar:
    """An open tar."""

    archive: Path
    file: tarfile.TarFile

    def headers(self) -> Iterator[tarfile.TarInfo]:
        """Each header in turn. Raises UserError for one that leads back: there would be no end."""
        for header in counted(self.archive, self.file):
            if header.size < 0:
                raise damaged(self.archive, f"{header.name[:200]!r} has {header.size} bytes")
            yield header

    def read(self, header: tarfile.TarInfo) -> bytes:
        """A file's content. Raises UserError where it ends early."""
        with intact(self.archive):
            data: bytes = self.content(header).read()
        if len(data) != header.size:
            raise damaged(self.archive, f"{header.name[:200]!r} ends early")
        return data

    def content(self, header: tarfile.TarInfo) -> Any:
        """A file's content as a stream of bytes."""
        content = self.file.extractfile(header)
        assert content is not None, f"{header.name} is a regular file without content"
        return content


class _Sips(io.BufferedReader):
    """A tar's bytes for tarfile, which reads a name at once, whatever length the tar says of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > LARGEST_SIP:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def open_tar_file(archive: Path, start: int = 0) -> Iterator[Tar]:
    """A tar, compressed as its name says, from the header at byte `start` on. Raises UserError for
    a file that is none."""
    openers: dict[str, Callable[..., Any]]
    openers = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with contextlib.ExitStack() as stack:
        with intact(archive):
            raw = stack.enter_context(open_regular(archive))
            opener = openers.get(archive.suffix.lower())
            sips = _Sips(raw if opener is None else stack.enter_context(opener(raw, "rb")))
            sips.seek(start)
            file = stack.enter_context(tarfile.open(fileobj=sips, mode="r:"))
        yield Tar(archive, file)
