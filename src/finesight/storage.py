"""Files that exist whole or not at all.

Everything that must survive a crash is written here: into a hidden neighbour first, flushed to the
disk, listed with SHA-256 digests, and only then given its name by one rename. Limits: the file
system must rename atomically within a folder and honour fsync (local Linux and macOS file systems
do; network file systems may not).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError

from finesight.child_processes import FileLock
from finesight.digests import DIGESTS, digest
from finesight.errors import UserError

_PARTIAL = ".partial"

AT_ONCE = 2**20
"""Bytes of small pieces that are written together."""

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another output folder, then start again",
    errno.EDQUOT: "free some of your quota or choose another output folder, then start again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another file system",
    errno.EROFS: "choose an output folder on a file system that can be written",
    errno.EACCES: "choose an output folder that you may write to, or change its permissions",
    errno.EPERM: "choose an output folder that you may write to, or change its permissions",
    errno.EISDIR: "remove the folder that is in the file's place, then start again",
    errno.ENOTDIR: "choose an output folder whose parents are folders",
    errno.ENAMETOOLONG: "choose a shorter output name",
    errno.EIO: "look after the disk, or choose an output folder on another one",
}


class Disk:
    """The file operations beneath this module, one method each.

    Tests put another one in force with `using` to fail, or to die, at a chosen operation.
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def open_to_append(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def sync(self, file: int) -> None:
        os.fsync(file)

    def sync_path(self, path: Path) -> None:
        """Flush a file that another writer closed, or the entries of a folder."""
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def free(self, path: Path) -> int:
        """Bytes that this user may still write to the disk of an existing file or folder."""
        return shutil.disk_usage(path).free


_DISK: ContextVar[Disk] = ContextVar("disk", default=Disk())  # noqa: B039 (it has no state)


@contextlib.contextmanager
def using(disk: Disk) -> Iterator[None]:
    """Within the block, carry out every file operation through `disk`."""
    token = _DISK.set(disk)
    try:
        yield
    finally:
        _DISK.reset(token)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a refusal of the machine (full, read-only, forbidden) into a UserError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise _refusal(path, error.errno) from error
    except SafetensorError as error:
        # Its writer reports errors of the system as text only.
        found = re.search(r"os error (\d+)", str(error))
        if not found or int(found[1]) not in _REMEDIES:
            raise
        raise _refusal(path, int(found[1])) from error


def _refusal(path: Path, number: int) -> UserError:
    return UserError(
        f"cannot be written: {os.strerror(number).lower()}",
        where=str(path),
        expected="a place that takes what is written",
        remedy=_REMEDIES[number],
    )


def require_room(path: Path, size: int, what: str, remedy: str) -> None:
    """Raises UserError unless `size` bytes are free for `what`, where `path` is or will be. Quotas
    are not known here: only writing tells."""
    with explained(path):
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = _DISK.get().free(there)
    if free < size:
        raise UserError(
            f"{free / 1e9:.3g} GB are free on this disk",
            where=str(path),
            expected=f"at least {size / 1e9:.3g} GB: {what}",
            remedy=remedy,
        )


def make_folder(path: Path) -> None:
    """Make `path` and its missing parents, each entry flushed."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with explained(path):
        for folder in reversed(missing):
            try:
                _DISK.get().make_folder(folder)
            except FileNotFoundError as error:  # some file systems have folders of their own only
                raise OSError(errno.EPERM, "no folder can be made here") from error
            _DISK.get().sync_path(folder.parent)


@contextlib.contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden empty folder; when the block ends well it becomes `target`, complete.

    Every file in it is flushed and listed in `sha256.json`. An error in the block, or a crash at
    any point, leaves no `target`. Of several processes that write it at once, the first to finish
    makes it. Raises UserError when `target` exists or cannot be written.
    """
    refuse_existing(target)
    make_folder(target.parent)
    with explained(target):
        _remove_leftovers(target)
        with _own_folder(target) as partial:
            yield partial
            _seal(partial)
            _give_name(partial, target)
        _DISK.get().sync_path(target.parent)


def write_folder_once(target: Path, write: Callable[[Path], None]) -> None:
    """`target` as `write` fills it, as `write_folder` does, unless it is there: of several
    processes that want it, one makes it, and the others wait."""
    make_folder(target.parent)
    path = target.with_suffix(".lock")
    with explained(target), FileLock(path, os.O_WRONLY | os.O_CREAT) as lock:
        lock.acquire()
        if not target.is_dir():
            with write_folder(target) as staging:
                write(staging)


@contextlib.contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden empty folder beside `target` for what is needed to make it, and remove it."""
    make_folder(target.parent)
    with explained(target):
        _remove_leftovers(target)
        with _own_folder(target) as folder:
            yield folder


@contextlib.contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, locked by this process, and gone in the end."""
    while True:
        partial = _hidden(target.with_name(f"{target.name}.{secrets.token_hex(4)}"))
        _DISK.get().make_folder(partial)
        try:
            with _locked(partial, wait=True) as alive:
                # Another process may have taken the new folder for a leftover before the lock.
                if alive:
                    yield partial
                    return
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _give_name(partial: Path, target: Path) -> None:
    refuse_existing(target)
    try:
        _DISK.get().rename(partial, target)
    except OSError:
        refuse_existing(target)  # another process was quicker by that moment
        raise


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of `target`; a living one holds a lock on its folder."""
    ours = re.compile(re.escape(f".{target.name}") + r"(\.[0-9a-f]{8})?" + re.escape(_PARTIAL))
    for folder in target.parent.iterdir():
        if ours.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with _locked(folder) as alive:
                if alive:
                    _DISK.get().remove_tree(folder)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock on `folder`, which ends with this process; False where there is none to hold.

    Where a file system locks no folders, one of this process's own counts as locked.
    """
    try:
        lock = FileLock(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    with lock:
        try:
            lock.acquire(wait=wait)
            held = True
        except OSError:
            held = wait
        yield held and folder.exists()


def _seal(folder: Path) -> None:
    disk = _DISK.get()
    files = _files(folder)
    assert files, f"nothing was written into {folder}"
    names = [file.relative_to(folder).as_posix() for file in files]
    # Read again while they are flushed.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, files)
        for file in files:
            disk.sync_path(file)
        listed = dict(zip(names, digests, strict=True))
    _write_new(folder / DIGESTS, ((json.dumps(listed, indent=1) + "\n").encode(),))
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        disk.sync_path(inner)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one rename; a file that was there stays whole until then."""
    write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Put the pieces one after another at `path` in one rename, as `write_file` does."""
    disk, partial = _DISK.get(), _hidden(path)
    make_folder(path.parent)
    with explained(path):
        try:
            _write_new(partial, pieces)
            disk.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        disk.sync_path(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append `line` and a line end to a file that its reader may find torn after a crash.

    Not flushed to the disk: a power failure loses the lines since `flush_file`. When the disk is
    full nothing of the line stays, and a UserError says so.
    """
    disk, data = _DISK.get(), f"{line}\n".encode()
    with explained(path):
        size = path.stat().st_size if path.exists() else 0
        file = disk.open_to_append(path)
        try:
            _write_all(file, data)
        except OSError:
            os.ftruncate(file, size)
            raise
        finally:
            os.close(file)


def flush_file(path: Path) -> None:
    """Let what has been appended to the file, if there is one, survive a power failure."""
    if path.exists():
        with explained(path):
            _DISK.get().sync_path(path)
            _DISK.get().sync_path(path.parent)


def cut_file(path: Path, size: int) -> None:
    """Shorten the file to its first `size` bytes, flushed."""
    with explained(path):
        _DISK.get().truncate(path, size)
        _DISK.get().sync_path(path)


def remove_folder(path: Path) -> None:
    """Delete a folder made by `write_folder`.

    It loses its name first, in one rename: a crash at any point leaves it complete or not seen.
    """
    disk, hidden = _DISK.get(), _hidden(path)
    with explained(path):
        if hidden.exists():
            disk.remove_tree(hidden)
        disk.rename(path, hidden)
        disk.sync_path(path.parent)
        disk.remove_tree(hidden)


def set_aside(path: Path, other: Path) -> None:
    """Give a folder another name; one that has it already makes room."""
    with explained(path):
        if other.exists():
            remove_folder(other)
        _DISK.get().rename(path, other)
        _DISK.get().sync_path(path.parent)


def sweep(folder: Path) -> None:
    """Remove what writes and deletions that never finished left in `folder`."""
    if not folder.is_dir():
        return
    with explained(folder):
        for leftover in folder.glob(f".*{_PARTIAL}"):
            if leftover.is_dir():
                _DISK.get().remove_tree(leftover)
            else:
                _DISK.get().remove_file(leftover)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_new(path: Path, pieces: Iterable[bytes]) -> None:
    file = _DISK.get().create(path)
    try:
        waiting, size = list[bytes](), 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= AT_ONCE:
                _write_all(file, b"".join(waiting))
                waiting, size = [], 0
        _write_all(file, b"".join(waiting))
        _DISK.get().sync(file)
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[_DISK.get().write(file, rest) :]


def refuse_existing(target: Path) -> None:
    """Raise UserError when there is anything at `target`."""
    if target.exists():
        raise UserError(
            f"{target.name} exists already and is never overwritten",
            where=str(target),
            expected="a name that is free",
            remedy="choose another name, or move it away first",
        )
