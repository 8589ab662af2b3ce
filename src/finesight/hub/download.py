"""Download of files over HTTP: allowed URLs, offline mode, resume and verification.

The content is written to a hidden partial file, verified by size and digest, and renamed. The next
attempt resumes a partial file with a Range request. `snapshot_download` of huggingface_hub deletes
partial files after an interruption and does not verify digests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from threading import Event
from urllib.parse import urljoin, urlsplit

import httpx2
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from finesight import __version__
from finesight.errors import UserError
from finesight.hub.archive import safe_join
from finesight.storage import make_folder, require_free_space, translate_os_errors, write_file

WEB_SCHEMES = frozenset({"http", "https"})
"""URL schemes of the web, whose hosts require `--allow-host`. Other schemes are object storage."""

PRIVATE_DOMAINS = frozenset(
    {"localhost", "local", "lan", "internal", "intranet", "home", "corp", "arpa"}
)

SPECIAL_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)
"""Networks without public hosts: special-purpose (RFC 6890) and multicast networks.

They are listed here because `ipaddress.is_global` differs between Python versions. IPv6 networks
outside of PUBLIC_IPV6 are omitted.
"""

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Network of global unicast addresses, the only public addresses of IPv6.

Loopback and link-local addresses and mapped IPv4 addresses are outside of it.
"""
_TRUE_VALUES = frozenset({"1", "ON", "YES", "TRUE"})


def is_offline() -> bool:
    """Return whether the environment variable HF_HUB_OFFLINE disables all requests."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE_VALUES


def raise_if_offline(url: str) -> None:
    """Raise UserError if offline mode forbids a request to a URL."""
    if is_offline():
        raise UserError(
            f"{url[:200]} requires a request, but HF_HUB_OFFLINE is set",
            where="offline mode",
            expected="a downloaded copy",
            remedy="unset HF_HUB_OFFLINE, or download it on another machine and use the folder",
        )


def is_allowed_url(original: str, target: str, allowed_hosts: frozenset[str] | None) -> bool:
    """Return whether a request to `original` may be redirected to `target`.

    Rejects protocols other than HTTP and HTTPS, downgrades from HTTPS to HTTP, and hosts that are
    neither listed nor public.

    Args:
        allowed_hosts: Hosts that the user allows; None for a hub (see `HttpSite`).
    """
    original_parts, target_parts = urlsplit(original), urlsplit(target)
    host = (target_parts.hostname or "").lower()
    # Accessing an invalid port or host name raises ValueError.
    if (
        not host
        or target_parts.username is not None
        or target_parts.port == 0
        or not host.encode("idna")
    ):
        return False
    if allowed_hosts is not None:
        return target_parts.scheme == "https" and host in allowed_hosts
    if host == (original_parts.hostname or "").lower():
        return target_parts.scheme == "https" or (
            target_parts.scheme == original_parts.scheme == "http"
        )
    # A host name that resolves to a private address has no valid certificate, so HTTPS rejects it.
    return target_parts.scheme == "https" and _is_public_host(host)


def _is_public_host(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # 2130706433 and 0x7f.1 are addresses, too; a host name ends with letters.
        parent_domain, _, top_level_domain = host.removesuffix(".").rpartition(".")
        return (
            bool(parent_domain)
            and top_level_domain not in PRIVATE_DOMAINS
            and (top_level_domain.isalpha() or top_level_domain.startswith("xn--"))
        )
    return is_public_address(address)


def is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an IP address is reachable on the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and address not in PUBLIC_IPV6:
        return False
    special = any(address in network for network in SPECIAL_NETWORKS)
    return address.is_global and not special


def parse_int(text: str) -> int | None:
    """Parse a non-negative integer in an HTTP header; None for any other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def strip_query(url: str) -> str:
    """Remove the query string of a URL, which may contain a signature."""
    return url.partition("?")[0]


def join_url(base: str, location: str) -> str:
    """Resolve the Location header of a redirect against the URL of the request."""
    try:
        return urljoin(base, location)
    except ValueError:  # rejected later like any invalid address
        return location


HTTP_TIMEOUT = httpx2.Timeout(60.0, connect=15.0)
"""Timeouts of connecting and of a single read; a complete response may take longer."""

MAX_REDIRECTS = 10
MAX_ERROR_BYTES = 4096

RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes of temporary failures, after which a request is retried."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Delays before successive retries in seconds."""

MAX_RETRY_DELAY_S = 60.0
"""Maximum delay in seconds that a server may request with Retry-After.

If a server requests a longer delay, the request fails.
"""

MAX_PARALLEL_DOWNLOADS = 4
"""Number of files that are downloaded in parallel.

Data sets may consist of many small files.
"""

LOCK_POLL_S = 0.2
"""Interval in seconds at which the lock of another process is checked."""

ProgressCallback = Callable[[int], None]
"""Callback that receives the number of new bytes; negative if bytes are discarded."""


class DownloadCancelled(Exception):
    """Raised to stop a download because another one failed or the user cancelled."""


class RetryableError(Exception):
    """Raised after a temporary failure of a server or connection.

    `retry_after` is the delay in seconds that the server requests, or None.
    """

    def __init__(self, what: str, retry_after: int | None = None) -> None:
        self.what, self.retry_after = what, retry_after
        super().__init__(what)

    def retry_delay(self, num_failures: int) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        With 0 failures (some bytes were received), the next attempt is immediate unless the server
        requests a delay.
        """
        requested_s = float(self.retry_after or 0)
        if num_failures > len(RETRY_DELAYS_S) or requested_s > MAX_RETRY_DELAY_S:
            return None
        return max(RETRY_DELAYS_S[num_failures - 1] if num_failures else 0.0, requested_s)


@dataclass(frozen=True, slots=True)
class HttpSite:
    """A hub or web site, with its request headers, allowed hosts and error messages.

    Attributes:
        build_error: Converts a response with a status of at least 400, and its text, to a
            UserError.
        headers: Request headers, which may contain a token. Redirects to other hosts do not receive
            them.
        allowed_hosts: Hosts of requests and redirects. None, used for hubs, allows the host of the
            request, and redirects to any public host over HTTPS, because hubs store large files on
            other hosts.
    """

    build_error: Callable[[httpx2.Response, str], UserError]
    headers: Mapping[str, str] = field(default_factory=dict)
    allowed_hosts: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server, with the properties that the listing contains.

    Attributes:
        path: Path relative to the target folder.
        size: Size in bytes; None if unknown.
        sha256: SHA-256 digest in hexadecimal; None if unknown.
        git_sha1: SHA-1 digest of the git blob, which includes the git header; None if unknown.
        is_mutable: Whether the content at the URL may change. An existing file is then kept only if
            the server confirms that it is unchanged, or in offline mode.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    limit: int | None = None
    is_mutable: bool = False

    @property
    def has_digest(self) -> bool:
        """Whether the content can be verified."""
        return self.sha256 is not None or self.git_sha1 is not None

    def needs_download(self, target: Path) -> bool:
        """Return whether `target` is missing, or has to be compared with the server."""
        return not target.exists() or (self.is_mutable and not is_offline())

    def check_size(self, num_bytes: int | None) -> None:
        """Raise UserError if the file has more bytes than listed or allowed."""
        max_bytes = self.size if self.size is not None else self.limit
        if num_bytes is not None and max_bytes is not None and num_bytes > max_bytes:
            raise UserError(
                f"at least {num_bytes} bytes",
                where=self.url,
                expected=f"at most {max_bytes} bytes"
                if self.size is None
                else f"{max_bytes} bytes, as listed",
                remedy="if this is intended, download it with another program and use its path",
            )

    def find_mismatch(self, stream: BufferedRandom) -> str:
        """Compare the size and digest of a downloaded file with the listing.

        Returns:
            Description of the first difference; empty if there is none.
        """
        size = stream.seek(0, os.SEEK_END)
        if self.size is not None and size != self.size:
            return f"received {size} bytes, expected {self.size}"
        expected = self.sha256 or self.git_sha1
        if expected is None:
            return ""
        name, digest = "SHA-256", hashlib.sha256()
        if self.sha256 is None:
            name = "git SHA-1"
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        stream.seek(0)
        actual = hashlib.file_digest(stream, lambda: digest).hexdigest()
        return "" if actual == expected.lower() else f"its {name} is {actual}, expected {expected}"


class Downloader:
    """Downloads files of one site over HTTP. In offline mode, every request raises UserError."""

    def __init__(self, site: HttpSite) -> None:
        self._site = site
        self._client = httpx2.Client(
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=HTTP_TIMEOUT,
            event_hooks={"response": [self._check_redirect]},
            # Sizes, ranges and digests apply to the file, so compression is disabled.
            headers={"User-Agent": f"finesight/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def download_all(self, files: Sequence[RemoteFile], folder: Path, source: str) -> None:
        """Download files in parallel with a progress bar, except those that exist.

        After an error, the other downloads are stopped. Partial files remain, so that the next
        attempt resumes them.
        """
        targets = [(file, safe_join(folder, file.path, source)) for file in files]
        missing = [(file, target) for file, target in targets if file.needs_download(target)]
        if not missing:
            return
        total_bytes = sum(file.size or 0 for file, _ in missing)
        require_free_space(
            folder, total_bytes, source, "free some space, or choose another disk (HF_HOME, --to)"
        )
        console = Console(stderr=True)
        if not console.is_terminal:
            console.print(
                f"{source}: downloading {len(missing)} files, {total_bytes:,} bytes",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        stop_event = Event()
        with (
            _build_progress_bar(console) as progress,
            ThreadPoolExecutor(MAX_PARALLEL_DOWNLOADS, thread_name_prefix="download") as executor,
        ):
            task_id = progress.add_task(source, total=total_bytes or None)
            futures = [
                executor.submit(
                    self.download, file, target, lambda n: progress.advance(task_id, n), stop_event
                )
                for file, target in missing
            ]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop_event.set()
                executor.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, DownloadCancelled):
                raise error

    def download(
        self,
        file: RemoteFile,
        target: Path,
        on_progress: ProgressCallback = lambda num_bytes: None,
        stop_event: Event | None = None,
    ) -> None:
        """Download and verify a file, unless the target is complete and current.

        A partial file of an earlier attempt is resumed. If several processes request the same file,
        one downloads it and the others wait.

        Raises:
            UserError: The file is not available, fails verification, or `target` is not writable.
            DownloadCancelled: `stop_event` is set.
        """
        if not file.needs_download(target):
            return
        make_folder(target.parent)
        partial = target.with_name(f".{target.name}.partial")
        stop_event = stop_event or Event()
        with translate_os_errors(target), _open_locked(partial, stop_event) as stream:
            if not file.needs_download(target):  # another process has downloaded it
                on_progress(target.stat().st_size)
                partial.unlink()
                return
            transfer = _Transfer(self, file, target, stream, on_progress, stop_event)
            num_existing = stream.seek(0, os.SEEK_END)
            on_progress(num_existing)
            if not transfer.receive():  # the target is current
                partial.unlink()
                return
            mismatch = file.find_mismatch(stream)
            if mismatch and num_existing:
                # The partial file may be of another version: restart once.
                transfer.truncate()
                transfer.receive()
                mismatch = file.find_mismatch(stream)
            if mismatch:
                partial.unlink()
                raise UserError(
                    f"{file.path} differs from the listing: {mismatch}; the file was discarded",
                    where=file.url,
                    expected="the bytes of the hub's listing",
                    remedy="try again; if it fails again, a mirror or a proxy changes files: use"
                    " another one (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
                )
            os.fsync(stream.fileno())
            partial.rename(target)
            if not file.is_mutable:
                transfer.etag_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Send a GET request, follow allowed redirects, and yield the response before its body.

        Raises:
            UserError: A redirect is not allowed, or the server rejects the request.
            RetryableError: The failure is temporary.
        """
        raise_if_offline(url)
        self._check_target(url, url)
        request_headers = {**self._site.headers, **headers}
        try:
            with self._client.stream("GET", url, headers=request_headers) as response:
                if response.status_code in RETRY_STATUSES:
                    raise RetryableError(
                        f"status {response.status_code}",
                        parse_int(response.headers.get("retry-after", "")),
                    )
                if response.status_code >= 400 and response.status_code != 416:
                    body = next(response.iter_raw(), b"")[:MAX_ERROR_BYTES]
                    raise self._site.build_error(response, body.decode("utf-8", "replace"))
                yield response
        except httpx2.TransportError as error:
            raise RetryableError(f"{type(error).__name__}: {error}") from error
        except httpx2.InvalidURL as error:
            raise UserError(
                f"invalid address: {error}", where=url[:200], expected="https://HOST/PATH",
                remedy="correct the address",
            ) from error  # fmt: skip
        except httpx2.TooManyRedirects as error:
            raise UserError(
                f"more than {MAX_REDIRECTS} redirects",
                where=url,
                expected="the file, or a redirect to it",
                remedy="download the file with another program and use its path",
            ) from error

    def _check_redirect(self, response: httpx2.Response) -> None:
        if response.has_redirect_location:
            original = str(response.request.url)
            self._check_target(original, join_url(original, response.headers["location"]))

    def _check_target(self, original: str, target: str) -> None:
        """Raise UserError if a URL, or the redirect to it from `original`, is not allowed."""
        hosts = self._site.allowed_hosts
        try:
            if is_allowed_url(original, target, hosts):
                return
        except ValueError:  # invalid port, address or name
            pass
        redirect_note = (
            "" if original == target else f", the redirect target of {urlsplit(original).netloc}"
        )
        raise UserError(
            f"{strip_query(target)[:200]} is not an allowed address{redirect_note}",
            where=strip_query(original)[:200],
            expected="a response from the hub, or from a public host over https"
            if hosts is None
            else f"a response from {', '.join(sorted(hosts))} over https",
            remedy="check the hub address (HF_ENDPOINT, MODELSCOPE_ENDPOINT)"
            if hosts is None
            else "if you trust this host, add it with --allow-host",
        )


@dataclass(slots=True)
class _Transfer:
    """Transfer of one remote file to the end of its locked partial file."""

    downloader: Downloader
    file: RemoteFile
    target: Path
    stream: BufferedRandom
    on_progress: ProgressCallback
    stop_event: Event

    def receive(self) -> bool:
        """Append to the partial file until it is complete, with retries.

        Returns:
            False if the server confirms that the target is unchanged.
        """
        file, num_failures, max_received = self.file, 0, 0
        while True:
            num_received = self.stream.seek(0, os.SEEK_END)
            if file.size is not None and num_received == file.size:
                return True
            if file.size is not None and num_received > file.size:
                num_received = self.truncate()
            try:
                with self.downloader.open(file.url, self._headers(num_received)) as response:
                    if response.status_code == 304:
                        return False
                    if self._append(response, num_received):
                        return True
                failure = RetryableError("the response ended early")
            except RetryableError as error:
                failure = error
            # A file shorter than listed is restarted, never extended past its end.
            size = self.stream.seek(0, os.SEEK_END)
            num_failures = 0 if size > max(num_received, max_received) else num_failures + 1
            max_received = max(max_received, size)
            delay_s = failure.retry_delay(num_failures)
            if delay_s is None:
                total_note = f" of {file.size}" if file.size is not None else ""
                raise UserError(
                    f"{file.path}: received {size}{total_note} bytes, then {failure.what}",
                    where=file.url,
                    expected="a response from the server",
                    remedy="check the connection and start again to resume the download",
                )
            if self.stop_event.wait(delay_s):
                raise DownloadCancelled

    def truncate(self) -> int:
        """Discard the partial content, and return the new size 0."""
        self.on_progress(-self.stream.seek(0, os.SEEK_END))
        return self.stream.truncate(0)

    def _headers(self, num_received: int) -> dict[str, str]:
        headers = {"Range": f"bytes={num_received}-"} if num_received else {}
        path = self.etag_path
        etag = path.read_text(encoding="utf-8") if path.exists() else ""
        # Without a digest, only the server can tell whether the file is unchanged.
        if etag and num_received and not self.file.has_digest:
            headers["If-Range"] = etag
        elif etag and self.target.exists():
            headers["If-None-Match" if '"' in etag else "If-Modified-Since"] = etag
        return headers

    @property
    def etag_path(self) -> Path:
        """Path of the ETag or date of the target, or of the partial file without a target."""
        return self.target.with_name(f".{self.target.name}.etag")

    def _append(self, response: httpx2.Response, num_received: int) -> bool:
        """Append the body of a response to the partial file.

        Returns:
            True if the file is complete. If the server does not support the range, the partial file
        """
        file, headers = self.file, response.headers
        content_range = headers.get("content-range", "").removeprefix("bytes ")
        is_partial = response.status_code == 206
        range_start = parse_int(content_range.partition("-")[0])
        if response.status_code == 416 or (is_partial and range_start != num_received):
            self.truncate()
            return False
        if not is_partial and num_received:
            self.truncate()
        total_bytes = parse_int(
            content_range.rpartition("/")[2] if is_partial else headers.get("content-length", "")
        )
        if not file.has_digest:
            self.target.unlink(missing_ok=True)  # its ETag is replaced
            etag = headers.get("etag", "") or headers.get("last-modified", "")
            write_file(self.etag_path, etag.encode() if etag.isascii() else b"")
            is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            if file.size is None and total_bytes is None and not is_chunked:
                raise UserError(
                    f"the server does not send the size of {file.path}",
                    where=strip_query(file.url),
                    expected="a size, a digest, or a chunked response: otherwise truncation is not"
                    " detected",
                    remedy="download it with another program, check that it is complete, and use"
                    " its path",
                )
        file.check_size(total_bytes)
        for chunk in response.iter_raw():
            if self.stop_event.is_set():
                raise DownloadCancelled
            self.stream.write(chunk)
            self.stream.flush()
            self.on_progress(len(chunk))
            file.check_size(self.stream.tell())
        return self.stream.tell() == total_bytes or (file.size is None and total_bytes is None)


@contextlib.contextmanager
def _open_locked(partial: Path, stop_event: Event) -> Iterator[BufferedRandom]:
    """Open and lock the partial file of a download.

    Other processes, such as other ranks, wait until the first one has finished.
    """
    for _ in itertools.count():
        with partial.open("ab+") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if stop_event.wait(LOCK_POLL_S):
                        raise DownloadCancelled from None
                    continue
                except OSError:  # some network file systems have no locks
                    pass
                break
            # Another process may have renamed or removed the file.
            if partial.exists() and os.path.samestat(partial.stat(), os.fstat(stream.fileno())):
                yield stream
                return


def _build_progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
