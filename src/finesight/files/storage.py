"""Write files and folders atomically, so that a crash leaves no partial result.

Data is written to a hidden file or folder next to the target, flushed to disk, and then renamed
once. Folders contain a list of SHA-256 digests. The file system must rename atomically within a
folder and honor fsync. Local Linux and macOS file systems do; network file systems may not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn

from safetensors import SafetensorError, safe_open

from finesight.errors import UserError
from finesight.files.bounded_files import read_json_object

_PARTIAL_SUFFIX = ".partial"
_HOST_TAG = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
_OWN_PARTIAL = re.compile(rf"\..+\.{_HOST_TAG}[0-9a-f]{{6}}\.partial", re.DOTALL)
_OWN_TEMPORARY = re.compile(rf"finesight-[a-z]+-{_HOST_TAG}-[a-z0-9_]{{8}}\.tmp")
"""Names of hidden folders of this machine, whose locks it knows, and of temporary folders."""

PRIVATE_FILE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700
"""Permissions of files and folders that only this user may read, such as keys and logs of jobs."""

WRITE_BUFFER_BYTES = 2**20
"""Number of bytes up to which small pieces are collected for one write call."""

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another output folder, then start again",
    errno.EDQUOT: "free some of your quota or choose another output folder, then start again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another file system",
    errno.EROFS: "choose an output folder on a writable file system",
    errno.EACCES: "choose an output folder that you may write to, or change its permissions",
    errno.EPERM: "choose an output folder that you may write to, or change its permissions",
    errno.EISDIR: "remove the folder with the name of the file, then start again",
    errno.EEXIST: "remove the file or link with the name of the folder, then start again",
    errno.ELOOP: "correct the symbolic link that refers to itself, or choose another name",
    errno.ENOTDIR: "choose an output folder whose parents are folders",
    errno.ENAMETOOLONG: "choose a shorter output name",
    errno.EIO: "check the disk, or choose an output folder on another one",
}


_forking = threading.RLock()
"""Lock that prevents a fork while the file of a FileLock is opened or closed."""


class FileLock(contextlib.AbstractContextManager["FileLock"]):
    """Lock on a file or folder with `flock`, which forked processes do not inherit.

    The lock is released by `close`, or when the process that acquired it ends.
    """

    _open: ClassVar[set[FileLock]] = set()

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        """Open `path` with the given `os.open` flags, without locking it. Raises OSError."""
        with _forking:
            self._descriptor: int | None = os.open(path, flags | os.O_NONBLOCK, 0o644)
            FileLock._open.add(self)

    def acquire(self, *, shared: bool = False, wait: bool = True) -> None:
        """Acquire the lock, or convert it between shared and exclusive.

        Args:
            shared: Acquire a shared lock, which several processes can hold, instead of an exclusive
                one.

        Raises:
            BlockingIOError: Another process holds the lock, and `wait` is False.
            OSError: The file system does not support locks, as some network file systems.
        """
        assert self._descriptor is not None, "a lock that was closed"
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(self._descriptor, kind | (0 if wait else fcntl.LOCK_NB))

    def close(self, *, unlock: bool = True) -> None:
        """Release the lock, or only close its file in a forked process (`unlock=False`)."""
        with _forking:
            FileLock._open.discard(self)
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    if unlock:
                        # Also of a process that was forked just now and has not closed its copy.
                        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                os.close(self._descriptor)
            self._descriptor = None

    def __exit__(self, *raised: object) -> None:
        self.close()


def _close_inherited_locks() -> None:
    """Close the lock files of the parent in a process that was just forked."""
    for lock in [*FileLock._open]:
        lock.close(unlock=False)
    _forking.release()


os.register_at_fork(
    before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_inherited_locks
)


class FileSystem:
    """The file operations of this module.

    Tests replace `file_system` to fail or crash at a chosen operation.
    """

    write, sync = staticmethod(os.write), staticmethod(os.fsync)
    rename, truncate = staticmethod(os.rename), staticmethod(os.truncate)

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        """Create a file in the place of one that a killed process left."""
        # The old one is never opened: it may be a link, or a file or pipe of another user, who
        # would read the content, or that of a process that writes at the same time.
        path.unlink(missing_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def open_append(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def sync_path(self, path: Path) -> None:
        """Flush a closed file, or the directory entries of a folder, to disk."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its content."""
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)

    def free_bytes(self, path: Path) -> int:
        """Return the free bytes for this user on the disk of an existing path."""
        return shutil.disk_usage(path).free


file_system = FileSystem()


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the `with` block to a UserError about `path`.

    Such errors are a full disk, a read-only file system or missing permissions.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The writer of safetensors reports errors of the system as text only.
        number: int | None = 0
        if isinstance(error, OSError):
            number = error.errno
        elif match := re.search(r"os error (\d+)", str(error)):
            number = int(match[1])
        if number not in _REMEDIES:
            raise
        raise UserError(
            f"cannot be written: {os.strerror(number).lower()}",
            where=str(path),
            expected="a writable location with free space",
            remedy=_REMEDIES[number],
        ) from error


def open_tensors(path: Path) -> Any:
    """Open a safetensors file; an OSError if it is removed meanwhile, in any order of events."""
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # PyTorch opens the file again, after its header was read
        raise OSError(str(error)) from error


def require_free_space(path: Path, num_bytes: int, purpose: str, remedy: str) -> None:
    """Raise UserError unless `num_bytes` are free on the disk of `path`.

    `purpose` and `remedy` are parts of the message. Quotas of a user are not considered: exceeding
    one fails when the data is written.
    """
    with translate_os_errors(path):
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = file_system.free_bytes(existing)
    if free < num_bytes:
        raise UserError(
            f"{free / 1e9:.3g} GB are free on this disk",
            where=str(path),
            expected=f"at least {num_bytes / 1e9:.3g} GB: {purpose}",
            remedy=remedy,
        )


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and flush each of them to disk."""
    missing_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    with translate_os_errors(path):
        for folder in reversed(missing_folders):
            try:
                file_system.make_folder(folder)
            except FileNotFoundError as error:  # some file systems have folders of their own only
                raise OSError(errno.EPERM, "cannot create a folder here") from error
            file_system.sync_path(folder.parent)


def make_private_folder(path: Path) -> None:
    """Create a folder that only this user can open, or close an existing one to others.

    Raises UserError for a link and for a folder of another user, who could replace its content.
    """
    make_folder(path)
    with translate_os_errors(path):
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
            owner = f"of the user {state.st_uid}"
            if stat.S_ISLNK(state.st_mode):
                owner = "a link"
            raise UserError(
                f"is {owner}, and others can change its content",
                where=str(path),
                expected="a folder of this user, and no link",
                remedy="move it away; a new one is created",
            )
        if stat.S_IMODE(state.st_mode) != PRIVATE_FOLDER_MODE:
            with contextlib.suppress(PermissionError):  # of a file system without permissions
                path.chmod(PRIVATE_FOLDER_MODE)


def state_folder() -> Path:
    """Return the folder of what this user has on this machine, such as keys, for all workspaces.

    Raises UserError without a home folder: the working directory may have been received.
    """
    state = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"))
    if not state.is_absolute():
        raise UserError(
            f"{state} is no absolute path",
            where="XDG_STATE_HOME",
            expected="a folder of this user on this machine, or a home folder",
            remedy="set the environment variable HOME or XDG_STATE_HOME to an absolute path",
        )
    return state / "finesight"


@contextlib.contextmanager
def write_folder(target: Path, before_rename: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a hidden empty folder that becomes `target` when the `with` block ends without error.

    All files are flushed to disk and listed in `sha256.json` with their digests; weights get the
    permissions of other files. An error or a crash at any point leaves no `target`. If several
    processes write it concurrently, the first to finish creates it. Raises UserError if `target`
    exists or cannot be written.

    Args:
        before_rename: Called when the files are on disk, before the folder gets its name; its
            errors leave no `target`.
    """
    raise_if_exists(target)
    with working_folder(target) as partial:
        yield partial
        _write_digests(partial)
        if before_rename is not None:
            before_rename()
        raise_if_exists(target)
        try:
            file_system.rename(partial, target)
        except OSError:
            raise_if_exists(target)  # another process finished first
            raise
        file_system.sync_path(target.parent)


def write_folder_once(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder with the function `write`, unless it exists.

    Concurrent processes wait until one of them has written it.
    """
    make_folder(target.parent)
    path = target.with_suffix(".lock")
    with translate_os_errors(target), FileLock(path, os.O_WRONLY | os.O_CREAT) as lock:
        lock.acquire()
        if not target.is_dir():
            with write_folder(target) as staging:
                write(staging)


@contextlib.contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden temporary folder next to `target`, and remove it after the `with` block."""

    def make() -> Path:
        folder = _partial_path(target.with_name(f"{target.name}.{_HOST_TAG}{secrets.token_hex(3)}"))
        file_system.make_folder(folder)
        return folder

    make_folder(target.parent)
    with translate_os_errors(target):
        remove_leftovers(target.parent, target.name)
        with _hold_new_folder(make) as folder:
            yield folder


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield a private temporary folder of a command, and remove it after the `with` block.

    Those that killed processes left are removed first.
    """
    remove_leftovers(Path(tempfile.gettempdir()))
    prefix = f"finesight-{name}-{_HOST_TAG}-"
    with _hold_new_folder(lambda: Path(tempfile.mkdtemp(".tmp", prefix))) as folder:
        yield folder


@contextlib.contextmanager
def _hold_new_folder(make: Callable[[], Path]) -> Iterator[Path]:
    """Yield a new locked folder, and remove it after the `with` block.

    The lock shows other processes that the folder is in use.
    """
    while True:
        folder = make()
        try:
            with _lock_folder(folder, wait=True) as is_locked:
                # Another process may have taken the new folder for a leftover before the lock.
                if is_locked:
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, target_name: str = "") -> None:
    """Remove folders of this user in `parent` that killed processes left.

    Those of running processes are locked. One that cannot be removed stays, such as one with files
    of another user.

    Args:
        target_name: Name of the folder to write, whose leftovers of other machines are removed too.
    """
    suffix = r"(\.[0-9a-f]{8,10})?" + re.escape(_PARTIAL_SUFFIX)
    own_target = re.compile(re.escape(f".{target_name}") + suffix)
    patterns = (_OWN_PARTIAL, _OWN_TEMPORARY, *([own_target] if target_name else []))
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        folders = [*parent.iterdir()]
    for folder in folders:
        if any(one.fullmatch(folder.name) for one in patterns):
            with contextlib.suppress(OSError):
                state = folder.lstat()
                if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid():
                    with _lock_folder(folder) as is_locked:
                        if is_locked:
                            file_system.remove(folder)


@contextlib.contextmanager
def _lock_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Acquire the lock of a folder for the `with` block.

    Yields False if another holder has the lock and `wait` is False. The lock is released at the
    latest when this process ends. On file systems without locks on folders, the folders of this
    process count as locked.
    """
    try:
        lock = FileLock(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    with lock:
        try:
            lock.acquire(wait=wait)
            is_held = True
        except OSError:
            is_held = wait
        yield is_held and folder.exists()


def _write_digests(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files, f"no files were written to {folder}"
    names = [file.relative_to(folder).as_posix() for file in files]
    # The functions that wrote the files did not hash them, so threads read them again while this
    # one waits for the disk.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_file, files)
        for file in files:
            if file.suffix == ".safetensors":  # which safetensors restricts to this user
                file.chmod(folder.stat().st_mode & 0o666)
            file_system.sync_path(file)
        content = json.dumps(dict(zip(names, digests, strict=True)), indent=1)
    _write_new_file(folder / DIGESTS_FILE, (f"{content}\n".encode(),))
    for subfolder in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        file_system.sync_path(subfolder)


def write_file(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """Write a file atomically: an existing file is replaced by one rename.

    Args:
        is_private: Whether only this user can read the file, whatever the umask is.
    """
    write_chunks(path, (data,), is_private=is_private)


def write_new_file(path: Path, data: bytes) -> None:
    """Write a new file atomically. Raises UserError if it exists.

    All results of a command are new files, unless the command knows that a file is its own.
    """
    write_chunks(path, (data,), replace=False)


def write_chunks(
    path: Path, pieces: Iterable[bytes], *, replace: bool = True, is_private: bool = False
) -> None:
    """Write the concatenated pieces to a file atomically.

    Args:
        replace: Whether an existing file is replaced, as by `write_file`.
        is_private: See `write_file`.
    """
    partial = _partial_path(path)
    make_folder(path.parent)
    with translate_os_errors(path):
        try:
            _write_new_file(partial, pieces, is_private=is_private)
            if not replace:
                raise_if_exists(path)
            _rename_new_file(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        file_system.sync_path(path.parent)


def write_files(files: Mapping[Path, Iterable[bytes]]) -> None:
    """Write several files: on a full disk, all of them keep their old content.

    Args:
        files: Content of each file, in pieces.
    """
    partials = {path: _partial_path(path) for path in files}
    try:
        for path, pieces in files.items():
            make_folder(path.parent)
            with translate_os_errors(path):
                _write_new_file(partials[path], pieces)
        # A rename over a file needs no space.
        for path, partial in partials.items():
            with translate_os_errors(path):
                _rename_new_file(partial, path)
                file_system.sync_path(path.parent)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file.

    The line is not flushed to disk: a power failure loses the lines since `flush_file`, and readers
    must accept a truncated last line. On a full disk, no part of the line is written, and UserError
    is raised.
    """
    data = f"{line}\n".encode()
    with translate_os_errors(path):
        size = path.stat().st_size if path.exists() else 0
        fd = file_system.open_append(path)
        try:
            _write_all(fd, data)
        except OSError:
            os.ftruncate(fd, size)
            raise
        finally:
            os.close(fd)


def flush_file(path: Path) -> None:
    """Flush the appended lines of an existing file to disk."""
    if path.exists():
        with translate_os_errors(path):
            file_system.sync_path(path)
            file_system.sync_path(path.parent)


def truncate_file(path: Path, size: int) -> None:
    """Truncate a file to its first `size` bytes, and flush it to disk."""
    with translate_os_errors(path):
        file_system.truncate(path, size)
        file_system.sync_path(path)


def remove_folder(path: Path) -> None:
    """Delete a folder written by `write_folder`.

    The folder is renamed to a hidden name first, so that a crash leaves it complete or invisible.
    """
    partial = _partial_path(path)
    with translate_os_errors(path):
        if partial.exists():
            file_system.remove(partial)
        file_system.rename(path, partial)
        file_system.sync_path(path.parent)
        file_system.remove(partial)


def move_folder(path: Path, target: Path) -> None:
    """Rename a folder to `target`, and replace an existing folder of that name."""
    with translate_os_errors(path):
        if target.exists():
            remove_folder(target)
        file_system.rename(path, target)
        file_system.sync_path(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove hidden files and folders that interrupted writes and deletions left in a folder."""
    with translate_os_errors(folder):
        for leftover in folder.glob(f".*{_PARTIAL_SUFFIX}"):
            file_system.remove(leftover)


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL_SUFFIX}")


def _write_new_file(path: Path, pieces: Iterable[bytes], *, is_private: bool = False) -> None:
    fd = file_system.create(path)
    try:
        if is_private:
            os.fchmod(fd, PRIVATE_FILE_MODE)
        waiting, size = list[bytes](), 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= WRITE_BUFFER_BYTES:
                _write_all(fd, b"".join(waiting))
                waiting, size = [], 0
        _write_all(fd, b"".join(waiting))
        file_system.sync(fd)
    finally:
        os.close(fd)


def _rename_new_file(partial: Path, path: Path) -> None:
    try:
        file_system.rename(partial, path)
    except FileNotFoundError as error:
        raise UserError(
            "another process wrote it, or removed its folder, at the same time",
            where=str(path),
            expected="one process that writes the file",
            remedy="start again, or choose another name",
        ) from error


def _write_all(fd: int, data: bytes) -> None:
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file_system.write(fd, remaining) :]


def check_new_path(target: Path) -> None:
    """Raise UserError unless a new file or folder can be created at a path.

    Commands call this before they compute what they write. An existing target is refused, and a
    folder that this user cannot write to.
    """
    raise_if_exists(target)
    with translate_os_errors(target):
        folder = next(one for one in target.absolute().parents if os.path.lexists(one))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    check_writable_folder(folder)


def check_writable_folder(folder: Path) -> None:
    """Raise UserError unless files can be created in a folder, which may be missing."""
    if not folder.is_dir():
        check_new_path(folder)
    elif not os.access(folder, os.W_OK | os.X_OK):
        with translate_os_errors(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_separate(option: str, path: Path, other_option: str, other: Path) -> None:
    """Raise UserError if an output of a command is, or is in, another output."""
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(other)):
        raise UserError(
            f"{path} is in {other}, which {other_option} creates",
            where=option,
            expected="different files or folders",
            remedy=f"choose another path for {option}",
        )


def raise_if_exists(target: Path) -> None:
    """Raise UserError if a path already exists, also as a broken link."""
    with translate_os_errors(target):
        try:
            target.lstat()
        except FileNotFoundError:
            return
    raise UserError(
        "exists already and is never overwritten",
        where=str(target),
        expected="an unused name",
        remedy=f"move it away first, or choose another name, such as {find_free_path(target)}",
    )


def find_free_path(path: Path) -> Path:
    """Return an unused path, with a number if necessary: `answers-2.jsonl`."""
    if path.name in ("", ".."):
        path = path.resolve()
    free = path
    numbers = count(2)
    while os.path.lexists(free):
        free = path.parent / f"{path.stem}-{next(numbers)}{path.suffix}"
    return free


def has_content(file: Path, content: bytes) -> bool:
    """Return whether a regular file has exactly this content."""
    # The size is compared first: another file may be too large to read.
    is_equal = file.is_file() and file.stat().st_size == len(content)
    return is_equal and file.read_bytes() == content


DIGESTS_FILE = "sha256.json"
"""File in a written folder that lists the SHA-256 of each file, in hexadecimal by name."""

MAX_DIGESTS_BYTES = 2**30
"""Maximum number of bytes of this file for a folder of samples, of about 120 per image."""


def sha256_file(file: Path) -> str:
    """Return the SHA-256 of the content of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_written_folder(path: Path) -> bool:
    """Return whether a folder has the files that `write_folder` wrote, and no others."""
    with contextlib.suppress(OSError, UserError):
        digests = read_json_object(path / DIGESTS_FILE, max_bytes=MAX_DIGESTS_BYTES)
        files = (file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
        names = {file.relative_to(path).as_posix() for file in files}
        return not path.is_symlink() and names == {*digests, DIGESTS_FILE}
    return False


def verify_folder(path: Path) -> None:
    """Verify that the files of a folder written by `write_folder` match its list of digests."""
    manifest, listing = path / DIGESTS_FILE, "file names with their SHA-256"
    remedy = "restore the folder from a copy, or delete it and make it again"

    def fail(what: str, where: Path, expected: str) -> NoReturn:
        raise UserError(what, where=str(where), expected=expected, remedy=remedy)

    if not path.is_dir():
        remedy = "check the path"
        fail(f"missing folder {path.name}", path, f"a folder with {DIGESTS_FILE}")
    if not manifest.is_file():
        what = f"{DIGESTS_FILE} is missing: the folder is incomplete"
        fail(what, path, "every file that was written, and their digests")
    digests = read_json_object(manifest, expected=listing, remedy=remedy)
    if not digests:
        fail("lists no file", manifest, listing)
    for name, digest in digests.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            fail(f"lists {name}, which is not in the folder", manifest, listing)
        if not (path / name).is_file():
            fail(f"the file {name} is missing", path, f"every file that {DIGESTS_FILE} lists")
        actual = sha256_file(path / name)
        if actual != digest:
            what = f"the file has changed since it was written, its SHA-256 is {actual}"
            fail(what, path / name, str(digest))
