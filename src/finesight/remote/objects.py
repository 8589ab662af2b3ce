"""Files in object storage, `s3://BUCKET/NAME` and whatever else fsspec has a package for.

Only what is named is opened. A file is fetched once, whole or not at all, into a folder of its own
whose name hangs on what the storage says of its version: another version is another folder.
"""

from __future__ import annotations

import hashlib
import posixpath
import sys
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.storage import write_folder_once

BY_THE_WEB = frozenset({"http", "https"})
"""What is fetched with more care: by `finesight data import --allow-host`."""

PATTERN = frozenset("*?[")


def objects_folder() -> Path:
    """Where fetched files lie."""
    # Imported here: it is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "objects"


def fetched(address: str) -> list[Path]:
    """The file at the address, or all files that a pattern fits, by name, on this machine. Raises
    UserError where there is none or it cannot be fetched."""
    system, root = _opened(address)
    with_names = PATTERN & {*root}
    try:
        names = sorted(system.glob(root)) if with_names else [root]
        files = [_brought(system, name) for name in names]
    except UserError:
        raise
    # Each storage's package has errors of its own, for refusals and for lines that break.
    except Exception as error:
        raise _unfetched(address, error) from error
    if not files:
        raise UserError(
            "no file fits",
            where=address,
            expected="an address, or a pattern such as s3://bucket/shards/*.tar",
            remedy="check the address",
        )
    return files


def _unfetched(address: str, error: Exception) -> UserError:
    said = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
    if isinstance(error, FileNotFoundError):
        expected, remedy = "a file that is there", "check the address"
    elif isinstance(error, PermissionError):
        expected, remedy = "a file that this machine may read", "check the credentials"
    else:
        expected = "a storage that answers, and lets this machine read"
        remedy = "check address, credentials and connection, and start again: what came is kept"
    return UserError(f"cannot be fetched ({said})", where=address, expected=expected, remedy=remedy)


def _opened(address: str) -> tuple[Any, str]:
    """The storage, and the name of the file in it."""
    scheme = address.partition("://")[0].lower()
    if scheme in BY_THE_WEB:
        raise UserError(
            "an address of the web",
            where=address,
            expected="a file of this machine, or one in object storage such as s3://BUCKET/NAME",
            remedy="bring it in with `finesight data import --allow-host HOST`",
        )
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            "reading it needs fsspec, which is not installed",
            where=address,
            remedy="pip install 'finesight[objects]' and the storage's own package (s3fs, gcsfs)",
        ) from error
    try:
        return fsspec.core.url_to_fs(address)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise UserError(
            f"no package for {scheme}: {error}",
            where=address,
            expected="a storage that fsspec knows",
            remedy="install the package for it, for example: pip install s3fs",
        ) from error


def _brought(system: Any, name: str) -> Path:
    """A file of the storage on this machine: there already, or fetched now."""
    version = str(system.ukey(name))
    told = f"{type(system).__name__} {system.storage_options!r} {name} {version}"
    folder = objects_folder() / hashlib.sha256(told.encode()).hexdigest()[:32]
    target = posixpath.basename(name)
    write_folder_once(folder, lambda staging: _fetch(system, name, version, staging / target))
    return folder / target


def _fetch(system: Any, name: str, version: str, target: Path) -> None:
    size = int(system.info(name)["size"])
    print(f"{name}: {size:,} bytes to fetch", file=sys.stderr)
    system.get_file(name, str(target))
    found = target.stat().st_size
    if found != size or str(system.ukey(name)) != version:
        raise UserError(
            f"came with {found} bytes of {size}, or changed on the way",
            where=name,
            expected="a whole file that stays as it is",
            remedy="start again",
        )
