"""Safe extraction of zip and tar archives from untrusted sources.

Extraction rejects path traversal, links, devices, encrypted files and decompression bombs. File
names are validated and output bytes are counted, because headers of an archive can be forged.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from finesight.errors import UserError
from finesight.file_name_encoding import ZIP_ENCODING, decode_name, to_readable_name
from finesight.hub.archive_members import (
    CHUNK_BYTES,
    TarArchive,
    build_archive_limit_error,
    iter_limited,
    open_tar,
    translate_archive_errors,
)
from finesight.hub.safe_path import safe_join
from finesight.regular_file import open_regular_file
from finesight.storage import make_folder, translate_os_errors

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
            raise self._build_error(f"two files with the name {target.name!r}")
        self.targets.add(target)

    def add_bytes(self, num_bytes: int) -> None:
        self.unpacked_bytes += num_bytes
        if self.unpacked_bytes > MAX_UNPACKED_BYTES:
            raise self._build_error(f"more than {MAX_UNPACKED_BYTES} bytes")
        if self.unpacked_bytes > max(UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * self.archive_bytes):
            raise self._build_error(
                f"more than {MAX_COMPRESSION_RATIO} times the {self.archive_bytes} bytes"
                " of the archive"
            )

    def _build_error(self, what: str) -> UserError:
        expected = (
            f"at most {MAX_UNPACKED_BYTES} bytes and {MAX_COMPRESSION_RATIO} times the archive"
        )
        return build_archive_limit_error(self.archive, what, expected)


def is_archive(name: str) -> bool:
    """Return whether a file name has the suffix of a zip or tar archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack_archive(archive: Path, target: Path) -> None:
    """Unpack a zip or tar archive into a folder.

    After an error, the caller must remove the folder, which may contain some of the files.

    Raises:
        UserError: The archive is corrupt or encrypted, exceeds a size limit, or contains links,
            devices or paths outside the folder.
    """
    budget = _UnpackBudget(archive, archive.stat().st_size)
    make_folder(target)
    open_members: Callable[[Path], contextlib.AbstractContextManager[Iterator[_ArchiveMember]]]
    open_members = _open_zip if archive.name.lower().endswith(".zip") else _open_tar
    with (
        translate_os_errors(target),
        translate_archive_errors(archive),
        open_members(archive) as members,
    ):
        for member in members:
            if any(pattern in member.name for pattern in _IGNORED_MEMBERS):
                continue
            path = safe_join(target, to_readable_name(member.name), str(archive))
            budget.add_target(path)
            make_folder(path.parent)
            with member.open_stream() as source, path.open("xb") as out:
                while chunk := source.read(CHUNK_BYTES):
                    budget.add_bytes(len(chunk))
                    out.write(chunk)


@dataclass(frozen=True, slots=True)
class _ArchiveMember:
    name: str
    open_stream: Callable[[], IO[bytes]]


@contextlib.contextmanager
def _open_zip(archive: Path) -> Iterator[Iterator[_ArchiveMember]]:
    with open_regular_file(archive) as raw, zipfile.ZipFile(raw) as file:
        yield _iter_zip_members(archive, file)


def _iter_zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[_ArchiveMember]:
    for info in iter_limited(archive, file.infolist()):
        file_type = stat.S_IFMT(info.external_attr >> 16)
        if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _build_special_file_error(archive, info.filename)
        if info.flag_bits & 1:
            raise UserError(
                f"{info.filename[:200]!r} is encrypted",
                where=str(archive),
                expected="an archive without a password",
                remedy="unpack it with another program and use the folder",
            )
        if info.is_dir():
            safe_join(archive, info.filename.rstrip("/") or "/", str(archive))
            continue
        yield _ArchiveMember(_zip_name(info), partial(file.open, info))


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


@contextlib.contextmanager
def _open_tar(archive: Path) -> Iterator[Iterator[_ArchiveMember]]:
    with open_tar(archive) as tar:
        yield _iter_tar_members(tar)


def _iter_tar_members(tar: TarArchive) -> Iterator[_ArchiveMember]:
    for info in tar.iter_headers():
        if info.isdir():
            if info.name not in (".", ""):
                safe_join(tar.archive, info.name, str(tar.archive))
            continue
        if not info.isreg():
            raise _build_special_file_error(tar.archive, info.name)
        yield _ArchiveMember(info.name, partial(tar.open_member, info))


def _build_special_file_error(archive: Path, name: str) -> UserError:
    return UserError(
        f"{name[:200]!r} is a link or a device, not a file",
        where=str(archive),
        expected="only files and folders",
        remedy="use the archive only if you trust its author: unpack it yourself and use the"
        " folder",
    )
