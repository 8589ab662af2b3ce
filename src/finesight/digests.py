"""The SHA-256 of files, and the manifest by which a folder is known to be whole."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from finesight.bounded_files import read_json_object
from finesight.errors import UserError

DIGESTS = "sha256.json"
"""The manifest of a folder: file name to SHA-256, in hexadecimal."""


def digest(file: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_folder(path: Path) -> None:
    """Read every file of a folder made by `write_folder` and compare it with the manifest.

    Raises UserError naming a missing file, or a changed file with both digests.
    """
    where, remedy = str(path), "restore the folder from a copy, or delete it and make it again"
    manifest = path / DIGESTS
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path.name}",
            where=where,
            expected=f"a folder with {DIGESTS}",
            remedy="check the path",
        )
    if not manifest.is_file():
        raise UserError(
            f"{DIGESTS} is missing: the folder is incomplete",
            where=where,
            expected="every file that was written, and their digests",
            remedy=remedy,
        )
    for name, expected in _read_digests(manifest, remedy).items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"lists {name}, which is not in the folder",
                where=str(manifest),
                expected="file names with their SHA-256",
                remedy=remedy,
            )
        if not (path / name).is_file():
            raise UserError(
                f"the file {name} is missing",
                where=where,
                expected=f"every file that {DIGESTS} lists",
                remedy=remedy,
            )
        found = digest(path / name)
        if found != expected:
            raise UserError(
                f"the file has changed since it was written, its SHA-256 is {found}",
                where=str(path / name),
                expected=str(expected),
                remedy=remedy,
            )


def _read_digests(manifest: Path, remedy: str) -> dict[str, object]:
    expected = "file names with their SHA-256"
    digests = read_json_object(manifest, expected=expected, remedy=remedy)
    if not digests:
        raise UserError("lists no file", where=str(manifest), expected=expected, remedy=remedy)
    return digests
