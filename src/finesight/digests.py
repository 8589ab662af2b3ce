"""The SHA-256 of files, and the manifest by which a folder is known to be whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    try:
        digests = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise UserError(
            f"not readable as JSON: {error}",
            where=str(manifest),
            expected="file names with their SHA-256",
            remedy=remedy,
        ) from error
    if not isinstance(digests, dict) or not digests:
        raise UserError(
            f"holds {type(digests).__name__} of {len(str(digests))} characters",
            where=str(manifest),
            expected="file names with their SHA-256",
            remedy=remedy,
        )
    return digests
