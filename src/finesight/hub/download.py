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
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from threading import Event
from urllib.parse import urljoin, urlsplit

import httpx2
from rich.console import Console

from finesight import __version__
from finesight.errors import UnavailableError, UserError, format_count
from finesight.files.archive import safe_join
from finesight.files.hub_address import is_offline
from finesight.files.storage import make_folder, require_free_space, translate_os_errors, write_file
from finesight.progress import ProgressConsole

WEB_SCHEMES = frozenset({"http", "https"})
"""URL schemes of the web, whose hosts require `--allow-host`. Other schemes are object storage."""

PRIVATE_DOMAINS = frozenset(
    {"localhost", "local", "lan", "internal", "intranet", "home", "corp", "arpa"}
)

SPECIAL_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
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


def raise_if_offline(url: str) -> None:
    """Raise UserError if offline mode forbids a request to a URL."""
    if is_offline():
        raise UnavailableError(
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
    original_parts = urlsplit(original)
    target_parts = urlsplit(target)
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

SPACE_REMEDY = "free some space, or choose another disk (HF_HOME, --to)"

MIN_STALL_BYTES = 1000
"""A response with fewer bytes within `STALL_SECONDS` counts as a failure.

Otherwise, a server could keep a download alive forever with single bytes.
"""

STALL_SECONDS = 60.0
"""Seconds after which the received bytes of a response are compared with `MIN_STALL_BYTES`."""

LOCK_POLL_S = 0.2
"""Interval in seconds at which the lock of another process is checked."""


class DownloadCancelled(Exception):
    """Raised to stop a download because another one failed or the user cancelled."""


class _RetryableError(Exception):
    """Raised after a temporary failure of a server or connection.

    `retry_after` is the delay in seconds that the server requests. `is_stalled` means that the
    received bytes are no progress.
    """

    def __init__(self, what: str, retry_after: int = 0, *, is_stalled: bool = False) -> None:
        super().__init__(what)
        self.retry_after = retry_after
        self.is_stalled = is_stalled


def get_retry_delay(num_failures: int, requested_s: int = 0) -> float | None:
    """Return the seconds to wait before the next attempt, or None to give up.

    With 0 failures (some bytes were received), the next attempt is immediate unless the server
    requests a delay.
    """
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
        """Return whether the content can be verified."""
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
                expected=f"at most {max_bytes} bytes",
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
        name = "SHA-256"
        digest = hashlib.sha256()
        if self.sha256 is None:
            name = "git SHA-1"
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        stream.seek(0)
        actual = hashlib.file_digest(stream, lambda: digest).hexdigest()
        if actual == expected.lower():
            return ""
        return f"its {name} is {actual}, expected {expected}"


class Downloader:
    """Downloads files of one site over HTTP. In offline mode, every request raises UserError."""

    def __init__(self, site: HttpSite) -> None:
        self._site = site
        self._stop_event = Event()
        self._on_progress: Callable[[int], None] = lambda num_bytes: None
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
        attempt resumes them. A downloader has one such call.
        """
        targets = [(file, safe_join(folder, file.path, source)) for file in files]
        missing = [(file, target) for file, target in targets if file.needs_download(target)]
        if not missing:
            return
        total_bytes = sum(file.size or 0 for file, _ in missing)
        require_free_space(folder, total_bytes, source, SPACE_REMEDY)
        with (
            _show_progress(source, len(missing), total_bytes) as self._on_progress,
            ThreadPoolExecutor(MAX_PARALLEL_DOWNLOADS, thread_name_prefix="download") as executor,
        ):
            futures = [executor.submit(self.download, file, target) for file, target in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop_event.set()
                executor.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, DownloadCancelled):
                raise error

    def download(self, file: RemoteFile, target: Path) -> None:
        """Download and verify a file, unless the target is complete and current.

        A partial file of an earlier attempt is resumed. If several processes request the same file,
        one downloads it and the others wait.

        Raises:
            UserError: The file is not available, fails verification, or `target` is not writable.
            DownloadCancelled: Another file of `download_all` failed.
        """
        if not file.needs_download(target):
            return
        make_folder(target.parent)
        partial = target.with_name(f".{target.name}.partial")
        with translate_os_errors(target), self._open_locked(partial) as stream:
            num_existing = stream.seek(0, os.SEEK_END)
            self._on_progress(num_existing)
            # Another process may have downloaded it, or the server confirms that it is current.
            if not (file.needs_download(target) and self._receive(file, target, stream)):
                partial.unlink()
                return
            mismatch = file.find_mismatch(stream)
            if mismatch and num_existing:  # of another version
                self._truncate(stream)
                self._receive(file, target, stream)
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
                _etag_path(target).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open_locked(self, partial: Path) -> Iterator[BufferedRandom]:
        """Open and lock the partial file of a download.

        Other processes, such as other ranks, wait until the first one has finished.
        """
        while True:
            with partial.open("ab+") as stream:
                while True:
                    try:
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        self._wait(LOCK_POLL_S)
                        continue
                    except OSError:  # some network file systems have no locks
                        pass
                    break
                # Another process may have renamed or removed the file.
                if partial.exists() and os.path.samestat(partial.stat(), os.fstat(stream.fileno())):
                    yield stream
                    return

    def _wait(self, seconds: float) -> None:
        if self._stop_event.wait(seconds):
            raise DownloadCancelled

    def _receive(self, file: RemoteFile, target: Path, stream: BufferedRandom) -> bool:
        """Append to the partial file until it is complete, with retries.

        Returns:
            False if the server confirms that the target is unchanged.
        """
        num_failures = 0
        max_received = 0
        while True:
            num_received = stream.seek(0, os.SEEK_END)
            if file.size is not None and num_received == file.size:
                return True
            if file.size is not None and num_received > file.size:
                num_received = self._truncate(stream)
            headers = _conditional_headers(file, target, num_received)
            try:
                with self._open(file.url, headers) as response:
                    if response.status_code == 304:
                        return False
                    if self._append(response, file, target, stream):
                        return True
                failure = _RetryableError("the response ended early")
            except _RetryableError as error:
                failure = error
            # A file shorter than listed is restarted, never extended past its end.
            size = stream.seek(0, os.SEEK_END)
            has_progress = size > max(num_received, max_received) and not failure.is_stalled
            num_failures += 1
            if has_progress:
                num_failures = 0
            max_received = max(max_received, size)
            delay_s = get_retry_delay(num_failures, failure.retry_after)
            if delay_s is None:
                total_note = f" of {file.size}" if file.size is not None else ""
                raise UnavailableError(
                    f"{file.path}: received {size}{total_note} bytes, then {failure}",
                    where=file.url,
                    expected="a response from the server",
                    remedy="check the connection and start again to resume the download",
                )
            self._wait(delay_s)

    def _truncate(self, stream: BufferedRandom) -> int:
        """Discard the partial content, and return the new size 0."""
        self._on_progress(-stream.seek(0, os.SEEK_END))
        return stream.truncate(0)

    def _append(
        self, response: httpx2.Response, file: RemoteFile, target: Path, stream: BufferedRandom
    ) -> bool:
        """Append the body of a response to the partial file; return whether it is complete."""
        headers = response.headers
        num_received = stream.tell()
        content_range = headers.get("content-range", "").removeprefix("bytes ")
        is_partial = response.status_code == 206
        is_wrong_range = is_partial and parse_int(content_range.partition("-")[0]) != num_received
        if not is_partial or is_wrong_range:
            self._truncate(stream)
        if response.status_code == 416 or is_wrong_range:
            return False
        if is_partial:
            total_bytes = parse_int(content_range.rpartition("/")[2])
        else:
            total_bytes = parse_int(headers.get("content-length", ""))
        if not file.has_digest:
            target.unlink(missing_ok=True)  # its ETag is replaced
            etag = headers.get("etag", "") or headers.get("last-modified", "")
            write_file(_etag_path(target), etag.encode() if etag.isascii() else b"")
            is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            if file.size is None and total_bytes is None and not is_chunked:
                raise UserError(
                    f"the server does not send the size of {file.path}",
                    where=strip_query(file.url),
                    expected="a size, a digest, or a chunked response, which show truncation",
                    remedy="download it with another program, check that it is complete, and use"
                    " its path",
                )
        file.check_size(total_bytes)
        window_start = time.monotonic()
        window_bytes = 0
        for chunk in response.iter_raw():
            self._wait(0)
            stream.write(chunk)
            stream.flush()
            self._on_progress(len(chunk))
            file.check_size(stream.tell())
            window_bytes += len(chunk)
            if time.monotonic() - window_start >= STALL_SECONDS:
                if window_bytes < MIN_STALL_BYTES:
                    what = f"only {window_bytes} bytes within {STALL_SECONDS:g} s"
                    raise _RetryableError(what, is_stalled=True)
                window_start = time.monotonic()
                window_bytes = 0
        return stream.tell() == total_bytes or (file.size is None and total_bytes is None)

    @contextlib.contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Send a GET request, follow allowed redirects, and yield the response before its body.

        Raises UserError if a redirect is not allowed or the server rejects the request, and
        `_RetryableError` if the failure is temporary.
        """
        raise_if_offline(url)
        self._check_target(url, url)
        request_headers = {**self._site.headers, **headers}
        try:
            with self._client.stream("GET", url, headers=request_headers) as response:
                status = response.status_code
                if status in RETRY_STATUSES:
                    retry_after = parse_int(response.headers.get("retry-after", ""))
                    raise _RetryableError(f"status {status}", retry_after or 0)
                if status >= 400 and status != 416:
                    body = next(response.iter_raw(), b"")[:MAX_ERROR_BYTES]
                    raise self._site.build_error(response, body.decode("utf-8", "replace"))
                yield response
        except httpx2.TransportError as error:
            raise _RetryableError(f"{type(error).__name__}: {error}") from error
        except (httpx2.InvalidURL, httpx2.TooManyRedirects) as error:
            what = f"invalid address: {error}"
            if isinstance(error, httpx2.TooManyRedirects):
                what = f"more than {MAX_REDIRECTS} redirects"
            raise UserError(
                what,
                where=strip_query(url)[:200],
                expected="https://HOST/PATH of the file",
                remedy="correct the address, or download the file with another program",
            ) from error

    def _check_redirect(self, response: httpx2.Response) -> None:
        if response.has_redirect_location:
            original = str(response.request.url)
            self._check_target(original, join_url(original, response.headers["location"]))

    def _check_target(self, original: str, target: str) -> None:
        """Raise UserError if a URL, or the redirect to it from `original`, is not allowed."""
        hosts = self._site.allowed_hosts
        with contextlib.suppress(ValueError):  # invalid port, address or name
            if is_allowed_url(original, target, hosts):
                return
        origin = ""
        if original != target:
            origin = f", the redirect target of {urlsplit(original).netloc}"
        expected = "from the hub, or from a public host"
        remedy = "check the hub address"
        if hosts is not None:
            expected = f"from {', '.join(sorted(hosts))}"
            remedy = "if you trust it, add the host"
        raise UserError(
            f"{strip_query(target)[:200]} is not an allowed address{origin}",
            where=strip_query(original)[:200],
            expected=f"a response {expected} over https",
            remedy=f"{remedy} (HF_ENDPOINT, MODELSCOPE_ENDPOINT; --allow-host)",
        )


def _etag_path(target: Path) -> Path:
    """Return the path of the ETag or date of a target, or of its partial file without it."""
    return target.with_name(f".{target.name}.etag")


def _conditional_headers(file: RemoteFile, target: Path, num_received: int) -> dict[str, str]:
    """Return the headers that request the rest of a file, or its content only if it changed."""
    headers = {"Range": f"bytes={num_received}-"} if num_received else {}
    path = _etag_path(target)
    etag = path.read_text(encoding="utf-8") if path.exists() else ""
    # Without a digest, only the server can tell whether the file is unchanged.
    if etag and num_received and not file.has_digest:
        headers["If-Range"] = etag
    elif etag and target.exists():
        headers["If-None-Match" if '"' in etag else "If-Modified-Since"] = etag
    return headers


@contextlib.contextmanager
def _show_progress(
    source: str, num_files: int, total_bytes: int
) -> Iterator[Callable[[int], None]]:
    """Show the progress in megabytes, and yield its callback.

    The callback receives the number of new bytes, negative if bytes are discarded.
    """
    console = ProgressConsole(Console(stderr=True))
    if not console.rich_console.is_terminal:
        files = format_count(num_files, "file")
        console.log(f"{source}: downloading {files}, {total_bytes:,} bytes")
    with console.progress_stage(f"{source}, MB", total_bytes / 1e6) as on_progress:
        yield lambda num_bytes: on_progress(num_bytes / 1e6)
