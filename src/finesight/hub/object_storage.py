"""Download of files from object storage, such as `s3://BUCKET/NAME`, with fsspec.

Each version of an object is cached in a separate folder, whose name is derived from its version id.
"""

from __future__ import annotations

import hashlib
import posixpath
import sys
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.storage import write_folder_once

WEB_SCHEMES = frozenset({"http", "https"})
"""URL schemes that are rejected here.

Files from the web require `finesight data import --allow-host`, which checks the host.
"""

GLOB_CHARACTERS = frozenset("*?[")


def get_objects_folder() -> Path:
    """Return the cache folder of files from object storage."""
    # This import is slow.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "objects"


def fetch_objects(url: str) -> list[Path]:
    """Download a file from object storage, or all files that match a pattern.

    Cached files are not downloaded again.

    Args:
        url: URL such as `s3://bucket/data.tar`, or a glob pattern such as
            `s3://bucket/shards/*.tar`.

    Returns:
        Local paths of the files, sorted by name.

    Raises:
        UserError: No file matches, a download fails, or the package of the storage is missing.
    """
    file_system, path = _open_file_system(url)
    is_pattern = GLOB_CHARACTERS & {*path}
    try:
        names = sorted(file_system.glob(path)) if is_pattern else [path]
        files = [_fetch_once(file_system, name) for name in names]
    except UserError:
        raise
    # Storage packages raise their own exceptions for rejected requests and lost connections.
    except Exception as error:
        raise _build_fetch_error(url, error) from error
    if not files:
        raise UserError(
            "no file matches",
            where=url,
            expected="an address, or a pattern such as s3://bucket/shards/*.tar",
            remedy="check the address",
        )
    return files


def _build_fetch_error(url: str, error: Exception) -> UserError:
    description = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
    if isinstance(error, FileNotFoundError):
        expected, remedy = "an existing file", "check the address"
    elif isinstance(error, PermissionError):
        expected, remedy = "a file with read access", "check the credentials"
    else:
        expected = "a storage that responds and allows read access"
        remedy = (
            "check address, credentials and connection, and start again: downloaded files are kept"
        )
    return UserError(
        f"download failed ({description})", where=url, expected=expected, remedy=remedy
    )


def _open_file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it."""
    scheme = url.partition("://")[0].lower()
    if scheme in WEB_SCHEMES:
        raise UserError(
            "an address of the web",
            where=url,
            expected="a local file, or one in object storage such as s3://BUCKET/NAME",
            remedy="import it with `finesight data import --allow-host HOST`",
        )
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            "fsspec is required, but not installed",
            where=url,
            remedy="pip install 'finesight[objects]' and the package of the storage (s3fs, gcsfs)",
        ) from error
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise UserError(
            f"no package for {scheme}: {error}",
            where=url,
            expected="a storage that fsspec supports",
            remedy="install its package, for example: pip install s3fs",
        ) from error


def _fetch_once(file_system: Any, name: str) -> Path:
    """Return the local copy of an object; download it if it is not cached."""
    version = str(file_system.ukey(name))
    cache_key = f"{type(file_system).__name__} {file_system.storage_options!r} {name} {version}"
    folder = get_objects_folder() / hashlib.sha256(cache_key.encode()).hexdigest()[:32]
    file_name = posixpath.basename(name)
    write_folder_once(
        folder, lambda staging: _download_object(file_system, name, version, staging / file_name)
    )
    return folder / file_name


def _download_object(file_system: Any, name: str, version: str, target: Path) -> None:
    size = int(file_system.info(name)["size"])
    print(f"{name}: downloading {size:,} bytes", file=sys.stderr)
    file_system.get_file(name, str(target))
    received_bytes = target.stat().st_size
    if received_bytes != size or str(file_system.ukey(name)) != version:
        raise UserError(
            f"received {received_bytes} bytes of {size}, or the file changed during the download",
            where=name,
            expected="a complete file that does not change",
            remedy="start again",
        )
