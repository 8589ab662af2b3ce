"""Open regular files only: a named pipe can block for ever, a device may have no end."""

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


class SpecialFile(UserError):
    """A path that leads to a named pipe, a socket or a device."""

    @classmethod
    def at(cls, path: str | Path, mode: int) -> SpecialFile:
        """Build the error for a path by its `st_mode`."""
        return cls(
            f"{_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file",
            where=str(path),
            expected="a regular file, or a link to one",
            remedy="copy what it gives into a file, or take it out of the folder",
        )


def is_special(mode: int) -> bool:
    """Return whether an `st_mode` is of something other than a regular file or a folder."""
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def refuse_special(path: Path) -> None:
    """Refuse an existing path that is neither a regular file nor a folder.

    For files that a library opens by their path. A path that cannot be examined passes: opening
    it says why.

    Raises:
        SpecialFile: The path leads to a named pipe, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if is_special(mode):
        raise SpecialFile.at(path, mode)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for the writer of a named pipe.

    Raises:
        SpecialFile: The path leads to a named pipe, a socket or a device.
        OSError: The file cannot be opened.
    """
    refuse_special(path)  # some devices act when they are opened
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise SpecialFile.at(path, mode)
