"""Zip and tar archives unpacked: nothing outside of the folder, no links, no bombs.

What an archive says of itself is not believed: names are checked, and bytes are counted as they
come out.
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
from finesight.file_names import DOS, decoded_name, readable_name
from finesight.regular_file import open_regular
from finesight.remote.inside import inside
from finesight.remote.members import PIECE, Tar, counted, intact, open_tar_file, too_much
from finesight.storage import explained, make_folder

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

MOST_BYTES = 500 * 10**9
MOST_RATIO = 100
"""Bytes out for one byte in. Labels as text reach 20, bombs a thousand and more."""

FREE_BYTES = 100 * 10**6
"""So many come out of any archive before the ratio counts: small ones may be very regular."""

_IS_UTF8 = 0x800
"""The flag of a zip archive's member whose name is UTF-8."""

_UNICODE_PATH = 0x7075

_BESIDES = ("__MACOSX/", ".DS_Store", "Thumbs.db")


@dataclass(slots=True)
class _Budget:
    """What may still come out of an archive of `size` bytes. Raises UserError when it is spent."""

    archive: Path
    size: int
    bytes: int = 0
    seen: set[Path] = field(default_factory=set)

    def member(self, target: Path) -> None:
        if target in self.seen:
            raise self._refusal(f"two files called {target.name!r} in one place")
        self.seen.add(target)

    def take(self, count: int) -> None:
        self.bytes += count
        if self.bytes > MOST_BYTES:
            raise self._refusal(f"over {MOST_BYTES} bytes")
        if self.bytes > max(FREE_BYTES, MOST_RATIO * self.size):
            raise self._refusal(f"over {MOST_RATIO} times its {self.size} bytes")

    def _refusal(self, what: str) -> UserError:
        expected = f"at most {MOST_BYTES} bytes, no more than {MOST_RATIO} times the archive"
        return too_much(self.archive, what, expected)


def is_archive(name: str) -> bool:
    """Whether a file's name ends as an archive's does."""
    return name.lower().endswith(ARCHIVES)


def unpack(archive: Path, target: Path) -> None:
    """Write the files of an archive below `target`, a folder of the caller's, who removes it after
    an error.

    Raises UserError for a name that leads elsewhere, a link, a device, more bytes or files than is
    reasonable, a password, and a damaged archive.
    """
    budget = _Budget(archive, archive.stat().st_size)
    make_folder(target)
    read: Callable[[Path], contextlib.AbstractContextManager[Iterator[_Member]]]
    read = _zipped if archive.name.lower().endswith(".zip") else _tarred
    with explained(target), intact(archive), read(archive) as members:
        for member in members:
            if any(part in member.name for part in _BESIDES):
                continue
            path = inside(target, readable_name(member.name), str(archive))
            budget.member(path)
            make_folder(path.parent)
            with member.open() as source, path.open("xb") as out:
                while piece := source.read(PIECE):
                    budget.take(len(piece))
                    out.write(piece)


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    open: Callable[[], IO[bytes]]


@contextlib.contextmanager
def _zipped(archive: Path) -> Iterator[Iterator[_Member]]:
    with open_regular(archive) as raw, zipfile.ZipFile(raw) as file:
        yield _zip_members(archive, file)


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[_Member]:
    for info in counted(archive, file.infolist()):
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _special(archive, info.filename)
        if info.flag_bits & 1:
            raise UserError(
                f"{info.filename[:200]!r} is protected by a password",
                where=str(archive),
                expected="an archive without",
                remedy="unpack it yourself and give the folder",
            )
        if info.is_dir():
            inside(archive, info.filename.rstrip("/") or "/", str(archive))
            continue
        yield _Member(_zip_name(info), partial(file.open, info))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name as it stands in the file: ZipFile cuts at a zero byte and turns backslashes.

    One that is not said to be UTF-8 may have its UTF-8 in a field of its own. Else it is in the
    encoding of whoever made the archive: UTF-8 or GBK if it can be, as ZipFile has it if not.
    """
    name = info.orig_filename
    if info.flag_bits & _IS_UTF8:
        return name
    try:
        content = name.encode(DOS)
        return _unicode_name(info.extra, content) or decoded_name(content)
    except UnicodeError:
        return name


def _unicode_name(extra: bytes, name: bytes) -> str | None:
    """The name in Info-ZIP's field for UTF-8, which holds a checksum of the other one."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field_, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field_[:5] == b"\1" + struct.pack("<I", zlib.crc32(name)):
            return field_[5:].decode()
    return None


@contextlib.contextmanager
def _tarred(archive: Path) -> Iterator[Iterator[_Member]]:
    with open_tar_file(archive) as tar:
        yield _tar_members(tar)


def _tar_members(tar: Tar) -> Iterator[_Member]:
    for info in tar.headers():
        if info.isdir():
            if info.name not in (".", ""):
                inside(tar.archive, info.name, str(tar.archive))
            continue
        if not info.isreg():
            raise _special(tar.archive, info.name)
        yield _Member(info.name, partial(tar.content, info))


def _special(archive: Path, name: str) -> UserError:
    return UserError(
        f"{name[:200]!r} is a link or a device, not a file",
        where=str(archive),
        expected="files and folders alone",
        remedy="do not use it unless you know who made it; then unpack it yourself and give the"
        " folder",
    )
