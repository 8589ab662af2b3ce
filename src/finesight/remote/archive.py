"""Zip and tar archives unpacked: nothing outside of the folder, no links, no bombs.

What an archive says of itself is not believed: names are checked, and bytes are counted as they
come out.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from finesight.errors import UserError
from finesight.remote.inside import inside
from finesight.storage import explained, make_folder

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

MOST_BYTES = 500 * 10**9
MOST_MEMBERS = 2_000_000
MOST_RATIO = 100
"""Bytes out for one byte in. Labels as text reach 20, bombs a thousand and more."""

FREE_BYTES = 100 * 10**6
"""So many come out of any archive before the ratio counts: small ones may be very regular."""

PIECE = 2**20
LARGEST_SIP = 16 * PIECE
"""Bytes that are taken at once; headers have a few hundred."""

_BESIDES = ("__MACOSX/", ".DS_Store", "Thumbs.db")


@dataclass(slots=True)
class _Budget:
    """What may still come out of an archive of `size` bytes. Raises UserError when it is spent."""

    archive: Path
    size: int
    bytes: int = 0
    members: int = 0
    seen: set[Path] = field(default_factory=set)

    def member(self, target: Path) -> None:
        self.members += 1
        if self.members > MOST_MEMBERS:
            raise self._refusal(f"over {MOST_MEMBERS} files")
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
        return UserError(
            f"{what} would come out of it; nothing was kept",
            where=str(self.archive),
            expected=f"at most {MOST_MEMBERS} files and {MOST_BYTES} bytes, no more than"
            f" {MOST_RATIO} times the archive",
            remedy="do not use it unless you know who made it; then unpack it yourself and give"
            " the folder",
        )


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
    with explained(target), _intact(archive), read(archive) as members:
        for member in members:
            if any(part in member.name for part in _BESIDES):
                continue
            path = inside(target, member.name, str(archive))
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
    with zipfile.ZipFile(archive) as file:
        yield _zip_members(archive, file)


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[_Member]:
    for info in file.infolist():
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
        # The name as it stands in the file: ZipFile cuts at a zero byte and turns backslashes.
        yield _Member(info.orig_filename, partial(file.open, info))


class _Sips(io.BufferedReader):
    """A tar's bytes for tarfile, which reads a name at once, whatever length the tar says of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > LARGEST_SIP:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def _tarred(archive: Path) -> Iterator[Iterator[_Member]]:
    openers: dict[str, Callable[..., Any]]
    openers = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with (
        openers.get(archive.suffix.lower(), open)(archive, "rb") as raw,
        tarfile.open(fileobj=_Sips(raw), mode="r:") as file,
    ):
        yield _tar_members(archive, file)


def _tar_members(archive: Path, file: tarfile.TarFile) -> Iterator[_Member]:
    for info in file:
        if info.isdir():
            if info.name not in (".", ""):
                inside(archive, info.name, str(archive))
            continue
        if not info.isreg():
            raise _special(archive, info.name)
        yield _Member(info.name, partial(_content, file, info))


def _content(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = file.extractfile(info)
    assert content is not None, f"{info.name} is a regular file without content"
    return content


def _special(archive: Path, name: str) -> UserError:
    return UserError(
        f"{name[:200]!r} is a link or a device, not a file",
        where=str(archive),
        expected="files and folders alone",
        remedy="do not use it unless you know who made it; then unpack it yourself and give the"
        " folder",
    )


@contextlib.contextmanager
def _intact(archive: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError,
        NotImplementedError,
        gzip.BadGzipFile, FileExistsError, NotADirectoryError, IsADirectoryError,
    ) as error:  # fmt: skip
        raise UserError(
            f"cannot be unpacked: {type(error).__name__}: {str(error)[:200]}",
            where=str(archive),
            expected="a whole zip or tar archive",
            remedy="fetch it again",
        ) from error
