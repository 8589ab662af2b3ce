"""Download of files from allowed web hosts over HTTPS, up to a size limit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import unquote, urlsplit

import httpx2

from finesight.errors import UserError
from finesight.hub.downloader import download_files
from finesight.hub.http_client import HttpClient, HttpSite, strip_query
from finesight.hub.transfer import RemoteFile, download_file, remove_if_stale

MAX_FILE_BYTES = 50 * 10**9
"""Maximum size of a downloaded file in bytes."""

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
        hosts: Allowed hosts, including those of redirects.
        folder: Cache folder. The file is stored in a subfolder per URL.

    Returns:
        Local path, with the file name of the URL.

    Raises:
        UserError: The scheme or host is not allowed, the download fails, or the file is too large.
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
    with HttpClient(HttpSite(_build_refusal_error, allowed_hosts=allowed_hosts)) as http_client:
        if file.is_mutable:
            remove_if_stale(file, target_folder / name, http_client)
        download_files([file], target_folder, http_client, host)
    return target_folder / name


def _check_url(url: str, allowed_hosts: frozenset[str]) -> str:
    """Return the host of an HTTPS URL.

    Raises:
        UserError: The URL is invalid, or its host is not allowed.
    """
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
        self._http_client = HttpClient(
            HttpSite(_build_refusal_error, allowed_hosts=self._allowed_hosts)
        )
        self._stop_event = Event()
        self._fetched_urls: set[str] = set()

    def fetch(self, url: str) -> Path:
        """Download an image from an allowed host, and return its local path.

        Raises:
            UserError: The URL or host is not allowed, the download fails, or the image is too
                large.
        """
        _check_url(url, self._allowed_hosts)
        target = self._folder / hashlib.sha256(url.encode()).hexdigest()
        file = RemoteFile(url, url, limit=MAX_IMAGE_BYTES, is_mutable=True)
        if url not in self._fetched_urls:
            remove_if_stale(file, target, self._http_client)
        download_file(file, target, self._http_client, _ignore_progress, self._stop_event)
        self._fetched_urls.add(url)
        return target


def _ignore_progress(num_bytes: int) -> None:
    """Ignore the progress of a single image, which has no progress bar."""
