"""Safe reading and extraction of zip and tar archives from untrusted sources.

Extraction rejects path traversal, links, devices, encrypted files and decompression bombs. File
names are validated and output bytes are counted, because headers of an archive can be forged. The
WebDataset reader opens tar files with the same limits.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from finesight.errors import UserError
from finesight.files.bounded_files import (
    ZIP_ENCODING,
    decode_name,
    open_regular_file,
    to_readable_name,
)
from finesight.files.storage import make_folder, translate_os_errors

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

MAX_UNPACKED_BYTES = 500 * 10**9
MAX_COMPRESSION_RATIO = 100
"""Maximum ratio of unpacked to archive bytes.

Archives of text labels reach a ratio of 20, decompression bombs more than 1,000.
"""

UNCHECKED_BYTES = 100 * 10**6
"""Unpacked bytes below which the compression ratio is not checked.

Small archives of regular data may have a high ratio.
"""

_IS_UTF8 = 0x800
"""Flag bit of a zip member whose name is encoded in UTF-8."""

_UNICODE_PATH = 0x7075

_IGNORED_MEMBERS = ("__MACOSX/", ".DS_Store", "Thumbs.db")

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
_DRIVE_PATTERN = re.compile(r"[A-Za-z]:")


_TRUST_REMEDY = (
    "use it only if you trust its author: unpack it with another program and use the folder"
)


def safe_join(folder: Path, name: str, source: str) -> Path:
    """Join an untrusted relative file name to a folder, without path traversal.

    Args:
        folder: Folder that must contain the result.
    """
    # Archives from Windows separate folders with backslashes.
    path = PurePosixPath(name.replace("\\", "/"))
    is_unsafe = (
        path.is_absolute() or ".." in path.parts or _DRIVE_PATTERN.match(name) or "\0" in name
    )
    if is_unsafe or not path.parts:
        raise UserError(
            f"file name {name[:200]!r} may be outside the target folder",
            where=source,
            expected="relative paths without `..`",
            remedy=_TRUST_REMEDY,
        )
    return folder.joinpath(*path.parts)


@dataclass(slots=True)
class _UnpackBudget:
    """Counter of unpacked bytes and files of one archive.

    Its methods raise UserError if the archive exceeds a limit or contains two files of one name.
    """

    archive: Path
    archive_bytes: int
    unpacked_bytes: int = 0
    targets: set[Path] = field(default_factory=set)

    def add_target(self, target: Path) -> None:
        if target in self.targets:
            raise _build_limit_error(self.archive, f"two files with the name {target.name!r}")
        self.targets.add(target)

    def add_bytes(self, num_bytes: int) -> None:
        self.unpacked_bytes += num_bytes
        if self.unpacked_bytes > MAX_UNPACKED_BYTES:
            raise _build_limit_error(self.archive, f"more than {MAX_UNPACKED_BYTES} bytes")
        if self.unpacked_bytes > max(UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * self.archive_bytes):
            what = f"more than {MAX_COMPRESSION_RATIO} times the {self.archive_bytes} bytes"
            raise _build_limit_error(self.archive, f"{what} of the archive")


def is_archive(name: str) -> bool:
    """Return whether a file name has the suffix of a zip or tar archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack_archive(archive: Path, target: Path) -> None:
    """Unpack a zip or tar archive into a folder.

    After an error, the caller must remove the folder, which may contain some of the files.
    """
    budget = _UnpackBudget(archive, archive.stat().st_size)
    make_folder(target)
    iter_members = _iter_zip if archive.name.lower().endswith(".zip") else _iter_tar
    with (
        translate_os_errors(target),
        _translate_archive_errors(archive),
        contextlib.closing(iter_members(archive)) as members,
    ):
        for name, open_stream in members:
            if any(pattern in name for pattern in _IGNORED_MEMBERS):
                continue
            path = safe_join(target, to_readable_name(name), str(archive))
            if open_stream is None:
                continue
            budget.add_target(path)
            make_folder(path.parent)
            with open_stream() as source, path.open("xb") as out:
                while chunk := source.read(CHUNK_BYTES):
                    budget.add_bytes(len(chunk))
                    out.write(chunk)


_Member = tuple[str, Callable[[], IO[bytes]] | None]
"""Name of a member, and the function that opens it; None for a folder."""


def _iter_zip(archive: Path) -> Generator[_Member]:
    with open_regular_file(archive) as raw, zipfile.ZipFile(raw) as file:
        for info in _iter_limited(archive, file.infolist()):
            file_type = stat.S_IFMT(info.external_attr >> 16)
            if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _build_member_error(archive, info.filename, "a link or a device, not a file")
            if info.flag_bits & 1:
                raise _build_member_error(archive, info.filename, "encrypted")
            if info.is_dir():
                yield info.filename.rstrip("/") or "/", None
            else:
                yield _zip_name(info), partial(file.open, info)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Decode the file name of a zip member from its raw bytes.

    ZipFile truncates names at NUL and converts backslashes. Without the UTF-8 flag, the name is
    read from the Unicode path extra field if there is one, else decoded as UTF-8, GBK or the
    default encoding of ZipFile, in this order.
    """
    name = info.orig_filename
    if info.flag_bits & _IS_UTF8:
        return name
    try:
        content = name.encode(ZIP_ENCODING)
        return _unicode_name(info.extra, content) or decode_name(content)
    except UnicodeError:
        return name


def _unicode_name(extra: bytes, name: bytes) -> str | None:
    """Return the file name in the Unicode path extra field of a zip member.

    Returns None without this field, or if its checksum does not match the raw name.
    """
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field_, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field_[:5] == b"\1" + struct.pack("<I", zlib.crc32(name)):
            return field_[5:].decode()
    return None


def _iter_tar(archive: Path) -> Generator[_Member]:
    with open_tar(archive) as tar:
        for info in tar.iter_headers():
            if info.isdir():
                if info.name not in (".", ""):
                    yield info.name, None
            elif info.isreg():
                yield info.name, partial(tar.open_member, info)
            else:
                raise _build_member_error(archive, info.name, "a link or a device, not a file")


def _build_member_error(archive: Path, name: str, what: str) -> UserError:
    return UserError(
        f"{name[:200]!r} is {what}",
        where=str(archive),
        expected="only files and folders, without a password",
        remedy=_TRUST_REMEDY,
    )


@contextlib.contextmanager
def _translate_archive_errors(archive: Path) -> Iterator[None]:
    """Convert exceptions that a corrupt archive causes to UserError.

    Disk errors, such as a full disk, are not converted.
    """
    try:
        yield
    except (*_CORRUPT_ERRORS, OSError) as error:
        # bz2 and gzip raise OSError without errno for invalid data.
        if isinstance(error, OSError) and error.errno not in _NON_DISK_ERRNOS:
            raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise _build_corrupt_error(archive, reason) from error


def _build_corrupt_error(archive: Path, reason: str) -> UserError:
    return UserError(
        f"cannot be read: {reason}",
        where=str(archive),
        expected="a complete zip or tar archive",
        remedy="download it again",
    )


def _build_limit_error(archive: Path, what: str) -> UserError:
    return UserError(
        f"it would unpack to {what}; no files were kept",
        where=str(archive),
        expected=f"at most {MAX_MEMBERS} files of different names, {MAX_UNPACKED_BYTES} bytes and"
        f" {MAX_COMPRESSION_RATIO} times the archive",
        remedy=_TRUST_REMEDY,
    )


def _iter_limited(archive: Path, headers: Iterable[HeaderT]) -> Iterator[HeaderT]:
    """Iterate over the headers of an archive, up to the maximum number of files."""
    iterator = iter(headers)
    for _ in range(MAX_MEMBERS):
        with _translate_archive_errors(archive):
            header = next(iterator, None)
        if header is None:
            return
        yield header
    raise _build_limit_error(archive, f"more than {MAX_MEMBERS} files")


@dataclass(frozen=True, slots=True)
class TarArchive:
    """An open tar archive whose headers and files are read with limits."""

    archive: Path
    file: tarfile.TarFile

    def iter_headers(self) -> Iterator[tarfile.TarInfo]:
        """Iterate over the headers of the archive."""
        for header in _iter_limited(self.archive, self.file):
            if header.size < 0:
                reason = f"{header.name[:200]!r} has {header.size} bytes"
                raise _build_corrupt_error(self.archive, reason)
            yield header

    def read_member(self, header: tarfile.TarInfo) -> bytes:
        """Return the content of one file in the archive."""
        with _translate_archive_errors(self.archive):
            content: bytes = self.open_member(header).read()
        if len(content) != header.size:
            raise _build_corrupt_error(self.archive, f"{header.name[:200]!r} is truncated")
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
        start: Byte offset of the first header to read, in the uncompressed archive.
    """
    openers: dict[str, Callable[..., Any]]
    openers = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with contextlib.ExitStack() as stack:
        with _translate_archive_errors(archive):
            raw = stack.enter_context(open_regular_file(archive))
            opener = openers.get(archive.suffix.lower())
            reader = _BoundedReader(
                raw if opener is None else stack.enter_context(opener(raw, "rb"))
            )
            reader.seek(start)
            file = stack.enter_context(tarfile.open(fileobj=reader, mode="r:"))
        yield TarArchive(archive, file)
