"""Names given by others, as paths that stay inside of a folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from finesight.errors import UserError

_DRIVE = re.compile(r"[A-Za-z]:")


def inside(folder: Path, name: str, where: str) -> Path:
    """The path below `folder` that a file name of an archive or a hub means.

    Raises UserError for one that could lead elsewhere: absolute, with a drive letter, with `..`.
    `where` says who gave the name.
    """
    # Archives made on Windows part folders by backslashes; here these would be part of a name.
    path = PurePosixPath(name.replace("\\", "/"))
    bad = path.is_absolute() or ".." in path.parts or _DRIVE.match(name) or "\0" in name
    if bad or not path.parts:
        raise UserError(
            f"it names the file {name[:200]!r}, which could lie outside of the folder it is for",
            where=where,
            expected="relative paths without `..`",
            remedy="do not use it unless you know who made it; then unpack it yourself and give"
            " the folder",
        )
    return folder.joinpath(*path.parts)
