"""SHA-256 digests of files, and verification of folders against their list of digests."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from finesight.bounded_files import read_json_object
from finesight.errors import UserError

DIGESTS_FILE = "sha256.json"
"""File in a written folder that lists the SHA-256 of each file, in hexadecimal by name."""


def sha256_file(file: Path) -> str:
    """Return the SHA-256 of the content of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_folder(path: Path) -> None:
    """Verify that the files of a folder written by `write_folder` match its list of digests.

    Raises:
        UserError: A file is missing or modified. The error contains both digests.
    """
    where, remedy = str(path), "restore the folder from a copy, or delete it and make it again"
    manifest = path / DIGESTS_FILE
    if not path.is_dir():
        raise UserError(
            f"missing folder {path.name}",
            where=where,
            expected=f"a folder with {DIGESTS_FILE}",
            remedy="check the path",
        )
    if not manifest.is_file():
        raise UserError(
            f"{DIGESTS_FILE} is missing: the folder is incomplete",
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
                expected=f"every file that {DIGESTS_FILE} lists",
                remedy=remedy,
            )
        actual = sha256_file(path / name)
        if actual != expected:
            raise UserError(
                f"the file has changed since it was written, its SHA-256 is {actual}",
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
