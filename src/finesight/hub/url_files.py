"""Download of files by URL: from allowed web hosts over HTTPS, or from object storage with fsspec.

Each version of an object, such as `s3://BUCKET/NAME`, is cached in a separate folder, whose name is
derived from its version id.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx2

from finesight.errors import Step, UserError
from finesight.files.path_patterns import GLOB_CHARACTERS
from finesight.files.storage import write_folder_once
from finesight.hub.download import WEB_SCHEMES, Downloader, HttpSite, RemoteFile, strip_query

MAX_FILE_BYTES = 50 * 10**9

MAX_IMAGE_BYTES = 200 * 10**6

_DIGEST_PATTERN = re.compile(r"sha256=([0-9a-fA-F]{64})")


def is_url(source: str) -> bool:
    """Return whether a string starts with a URL scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def fetch_url(source: str, hosts: Sequence[str], folder: Path) -> Path:
    """Download a file from an allowed web host over HTTPS.

    Args:
        source: URL. With `#sha256=HEX` at its end, the file is verified. Otherwise an existing file
            is downloaded again if the server reports a change.
        folder: Cache folder. The file is stored in a subfolder per URL.
    """
    url, _, fragment = source.partition("#")
    allowed_hosts = frozenset(host.lower() for host in hosts)
    host = _check_url(url, allowed_hosts)
    digest_match = _DIGEST_PATTERN.fullmatch(fragment)
    if fragment and digest_match is None:
        raise UserError(
            f"{fragment[:80]!r} after the # of the URL",
            where=source[:200],
            expected="#sha256= and 64 hexadecimal digits, or no fragment",
            remedy="correct or remove the fragment",
        )
    name = PurePosixPath(unquote(urlsplit(url).path)).name or "file"
    target_folder = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    sha256 = digest_match[1] if digest_match else None
    file = RemoteFile(name, url, sha256=sha256, limit=MAX_FILE_BYTES, is_mutable=not sha256)
    with Downloader(HttpSite(_build_refusal_error, allowed_hosts=allowed_hosts)) as downloader:
        downloader.download_all([file], target_folder, host)
    return target_folder / name


def _check_url(url: str, allowed_hosts: frozenset[str]) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme.lower() != "https" or not parts.hostname:
        raise UserError(
            f"{url[:200]!r} is not a supported URL",
            where="SOURCE",
            expected="https://HOST/PATH, hf:OWNER/NAME, modelscope:OWNER/NAME, or a path",
            remedy="download it with another program and use its path",
        )
    if parts.hostname.lower() not in allowed_hosts:
        raise UserError(
            f"downloads from {parts.hostname} are not allowed",
            where=url[:200],
            expected="--allow-host for each host, including redirects",
            remedy=f"if you trust it: --allow-host {parts.hostname}",
        )
    return parts.hostname


def _build_refusal_error(response: httpx2.Response, message: str) -> UserError:
    return UserError(
        f"the server rejects the request with status {response.status_code}",
        where=strip_query(str(response.request.url))[:200],
        expected="the file",
        remedy="check the URL; if it requires a login, download it with another program and use"
        " its path",
    )


class RemoteImages:
    """Downloader of images that the rows of a data source reference by URL.

    Images are cached in a folder. Each import asks the server once per image whether it has
    changed.
    """

    def __init__(self, hosts: Sequence[str], folder: Path) -> None:
        self._allowed_hosts = frozenset(host.lower() for host in hosts)
        self._folder = folder
        self._downloader = Downloader(
            HttpSite(_build_refusal_error, allowed_hosts=self._allowed_hosts)
        )
        self._fetched_urls: set[str] = set()

    def fetch(self, url: str) -> Path:
        """Download an image from an allowed host, and return its local path."""
        _check_url(url, self._allowed_hosts)
        target = self._folder / hashlib.sha256(url.encode()).hexdigest()
        file = RemoteFile(url, url, limit=MAX_IMAGE_BYTES, is_mutable=True)
        if url not in self._fetched_urls:
            self._downloader.download(file, target)
            self._fetched_urls.add(url)
        return target


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
        expected = "an existing file"
        remedy = "check the address"
    elif isinstance(error, PermissionError):
        expected = "a file with read access"
        remedy = "check the credentials"
    else:
        expected = "a storage that responds and allows read access"
        remedy = (
            "check address, credentials and connection, and start again: downloaded files are kept"
        )
    return UserError(
        f"download failed ({description})", where=url, expected=expected, remedy=remedy
    )


def _open_file_system(url: str) -> tuple[Any, str]:
    scheme = url.partition("://")[0].lower()
    if scheme in WEB_SCHEMES:
        arguments = {"source": url, "out": "OUT", "allow_host": ["HOST"]}
        raise UserError(
            "an address of the web",
            where=url,
            expected="a local file, or one in object storage such as s3://BUCKET/NAME",
            remedy=Step("import", arguments, "import it"),
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
