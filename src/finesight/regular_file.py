"""Open regular files and reject special files.

Reading a named pipe can block forever, and a device can be infinite.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from finesight.errors import UserError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class SpecialFileError(UserError):
    """Raised for a path that is a named pipe, a socket or a device."""

    @classmethod
    def from_mode(cls, path: str | Path, mode: int) -> SpecialFileError:
        """Build the error for a path with the file type in its `st_mode`."""
        return cls(
            f"{_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file",
            where=str(path),
            expected="a regular file, or a link to one",
            remedy="copy its content to a file, or remove it from the folder",
        )


def is_special_file(mode: int) -> bool:
    """Return whether an `st_mode` is neither a regular file nor a folder."""
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def reject_special_file(path: Path) -> None:
    """Raise SpecialFileError for an existing path that is neither a regular file nor a folder.

    Called before a library opens a file by its path. Missing and inaccessible paths are accepted,
    since opening them raises an error.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if is_special_file(mode):
        raise SpecialFileError.from_mode(path, mode)


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; never block on a named pipe.

    Raises:
        SpecialFileError: The path is a named pipe, a socket or a device.
        OSError: The file cannot be opened.
    """
    reject_special_file(path)  # some devices act when they are opened
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise SpecialFileError.from_mode(path, mode)
