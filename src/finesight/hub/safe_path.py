"""Validation of untrusted file names in archives and file listings."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from finesight.errors import UserError

_DRIVE_PATTERN = re.compile(r"[A-Za-z]:")


def safe_join(folder: Path, name: str, source: str) -> Path:
    """Join an untrusted relative file name to a folder, without path traversal.

    Args:
        folder: Folder that must contain the result.
        name: Untrusted name, with slashes or backslashes.
        source: Origin of the name, for the error message.

    Raises:
        UserError: The name is an absolute path, or contains a drive letter, `..` or NUL.
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
            remedy="use it only if you trust its author: unpack it yourself and use the folder",
        )
    return folder.joinpath(*path.parts)
