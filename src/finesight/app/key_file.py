"""API key of the servers that the studio starts."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from finesight.errors import UserError
from finesight.files.storage import (
    PRIVATE_FILE_MODE,
    FileLock,
    make_private_folder,
    state_folder,
    translate_os_errors,
    write_file,
)

KEY_FILE = "api-key"


def load_key_file() -> Path:
    """Return the file with the API key of this user, and create a missing one.

    A key in the workspace would be known to whoever made or copied the workspace.

    Raises:
        UserError: Other users could have read or written the file.
    """
    folder = state_folder()
    make_private_folder(folder)
    file = folder / KEY_FILE
    with translate_os_errors(file), FileLock(folder) as lock:
        lock.acquire()
        if not os.path.lexists(file):
            write_file(file, f"{secrets.token_urlsafe(32)}\n".encode(), is_private=True)
        state = file.lstat()
        is_own = stat.S_ISREG(state.st_mode) and state.st_uid == os.getuid()
        if not is_own or state.st_mode & 0o077:
            raise UserError(
                f"is no file that only this user can read (mode {stat.filemode(state.st_mode)})",
                where=str(file),
                expected=f"a regular file with the permissions {PRIVATE_FILE_MODE:o}",
                remedy="delete it, and start the server again: it gets a new key",
            )
    return file
