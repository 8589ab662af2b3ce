"""HTTP client with host checks, validated redirects, retries, and UserError for failures."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

# The HTTP library of huggingface_hub.
import httpx2

from finesight import __version__
from finesight.bounded_files import parse_json
from finesight.errors import UserError

CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 60.0
"""Timeout of one read, not of the complete response."""

MAX_REDIRECTS = 10
MAX_JSON_BYTES = 64 * 2**20
"""Maximum bytes of a JSON response; a page of a listing has a few hundred KB."""

MAX_ERROR_BYTES = 4096
"""Maximum bytes of an error response, before decompression."""

RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary failures."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Delays between attempts in seconds."""

MAX_RETRY_DELAY_S = 60.0
"""Maximum Retry-After in seconds; with a longer one, the request is not repeated."""

PRIVATE_DOMAINS = frozenset(
    {"localhost", "local", "lan", "internal", "intranet", "home", "corp", "arpa"}
)
"""Top-level domains of private networks."""

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
"""Networks of the IANA special-purpose address registries (RFC 6890), and multicast.

They contain no public hosts. The `ipaddress` module depends on the Python version. For IPv6, only
those within PUBLIC_IPV6 are listed.
"""

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Global unicast addresses: loopback, translation and local networks are outside."""
_TRUE_VALUES = frozenset({"1", "ON", "YES", "TRUE"})


ReadT = TypeVar("ReadT")


class RetryableError(Exception):
    """Temporary failure of a server or connection, with the requested delay in seconds."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        self.what, self.retry_after = what, retry_after
        super().__init__(what)

    def retry_delay(self, num_failures: int) -> float | None:
        """Return the delay before the next attempt; None if there is none.

        Without failures, as after received bytes, the next attempt is immediate.
        """
        if num_failures > len(RETRY_DELAYS_S) or (self.retry_after or 0) > MAX_RETRY_DELAY_S:
            return None
        return max(
            RETRY_DELAYS_S[num_failures - 1] if num_failures else 0.0, self.retry_after or 0.0
        )


@dataclass(frozen=True, slots=True)
class HttpSite:
    """Target of requests. `headers`, which may contain a token, are sent to the first host only.

    `allowed_hosts` lists all hosts of requests and redirects. None, for a hub, allows the host of
    the first address and any public host over HTTPS, since hubs store large files on other hosts.
    The error callback converts a status >= 400 and the response text to UserError.
    """

    build_error: Callable[[httpx2.Response, str], UserError]
    headers: Mapping[str, str] = field(default_factory=dict)
    allowed_hosts: frozenset[str] | None = None


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE disables requests to all hubs."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE_VALUES


class HttpClient:
    """HTTP client of one site. Raises UserError for each request in offline mode."""

    def __init__(self, site: HttpSite) -> None:
        self._site = site
        self._client = httpx2.Client(
            follow_redirects=False,
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # Sizes, ranges and digests apply to the file, so compression is disabled.
            headers={"User-Agent": f"finesight/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    @contextlib.contextmanager
    def stream_get(
        self, url: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Send a GET request, follow valid redirects, and return the response before its body.

        Raises UserError for an invalid redirect or a rejected request, and RetryableError for a
        temporary failure.
        """
        _raise_if_offline(url)
        target = url
        for _ in range(MAX_REDIRECTS):
            self._check_target(url, target)
            is_same_host = urlsplit(target).netloc == urlsplit(url).netloc
            site_headers = self._site.headers if is_same_host else {}
            with _translate_http_errors(target), contextlib.ExitStack() as stack:
                response = stack.enter_context(
                    self._client.stream("GET", target, headers={**site_headers, **(headers or {})})
                )
                if response.has_redirect_location:
                    target = join_url(target, response.headers["location"])
                    continue
                if response.status_code in RETRY_STATUSES:
                    raise RetryableError(
                        f"status {response.status_code}", _get_retry_after(response)
                    )
                if response.status_code >= 400 and response.status_code != 416:
                    body = next(response.iter_raw(), b"")[:MAX_ERROR_BYTES]
                    raise self._site.build_error(response, body.decode("utf-8", "replace"))
                yield response
                return
        raise UserError(
            f"more than {MAX_REDIRECTS} redirects",
            where=url,
            expected="the file, or a redirect to it",
            remedy="download the file with another program and use its path",
        )

    def get_json(self, url: str, params: Mapping[str, str] | None = None) -> Any:
        """Send a GET request with retries, and parse the JSON response.

        Raises UserError for a rejected request, invalid content, and no response.
        """
        full_url = f"{url}?{urlencode(params)}" if params else url
        content = self._get_content(full_url)
        try:
            return parse_json(content)
        except ValueError as error:
            raise UserError(
                f"invalid JSON in the response: {content[:60]!r}",
                where=full_url,
                expected="a response of a hub",
                remedy="check the hub address (HF_ENDPOINT, MODELSCOPE_ENDPOINT) and the proxy",
            ) from error

    def is_unchanged(self, url: str, etag: str) -> bool:
        """Return whether the file at an address still has this ETag.

        Raises UserError like `get_json`.
        """
        conditional_headers = {"If-None-Match" if '"' in etag else "If-Modified-Since": etag}
        return self._get_with_retries(
            url, conditional_headers, lambda response: _is_not_modified(response, etag)
        )

    def _get_content(self, url: str) -> bytes:
        return self._get_with_retries(url, {}, _read_limited)

    def _get_with_retries(
        self,
        url: str,
        headers: Mapping[str, str],
        read_response: Callable[[httpx2.Response], ReadT],
    ) -> ReadT:
        """Send a GET request with retries, and read the response."""
        for num_failures in itertools.count(1):
            try:
                with self.stream_get(url, headers) as response:
                    return read_response(response)
            except RetryableError as failure:
                delay_s = failure.retry_delay(num_failures)
                if delay_s is None:
                    raise UserError(
                        f"no response: {failure.what}",
                        where=url,
                        expected="a response from the server",
                        remedy="check the connection and start again: partial files are kept;"
                        " with HF_HUB_OFFLINE=1, downloaded files are used",
                    ) from failure
                time.sleep(delay_s)
        raise AssertionError("retry loop ended without a result")

    def _check_target(self, original: str, target: str) -> None:
        try:
            is_allowed = is_allowed_url(original, target, self._site.allowed_hosts)
        except ValueError:  # invalid port, address or name
            is_allowed = False
        if not is_allowed:
            redirect_note = (
                ""
                if original == target
                else f", the redirect target of {urlsplit(original).netloc}"
            )
            raise UserError(
                f"{strip_query(target)[:200]} is not an allowed address{redirect_note}",
                where=strip_query(original)[:200],
                expected=f"a response from {', '.join(sorted(self._site.allowed_hosts))} over https"
                if self._site.allowed_hosts is not None
                else "a response from the hub, or from a public host over https",
                remedy="if you trust this host, add it with --allow-host"
                if self._site.allowed_hosts is not None
                else "check the hub address (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
            )


def is_allowed_url(original: str, target: str, allowed_hosts: frozenset[str] | None) -> bool:
    """Return whether a redirect from `original` to `target` is allowed.

    Rejects other protocols, downgrades from HTTPS to HTTP, and private addresses that the user did
    not list.
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
    """Return whether an address belongs to a host of the public network."""
    if isinstance(address, ipaddress.IPv6Address) and address not in PUBLIC_IPV6:
        return False
    special = any(address in network for network in SPECIAL_NETWORKS)
    return address.is_global and not special


def _raise_if_offline(url: str) -> None:
    if is_offline():
        raise UserError(
            f"{url[:200]} requires a request, but HF_HUB_OFFLINE is set",
            where="offline mode",
            expected="a downloaded copy",
            remedy="unset HF_HUB_OFFLINE, or download it on another machine and use the folder",
        )


@contextlib.contextmanager
def _translate_http_errors(url: str) -> Iterator[None]:
    """Convert network errors to RetryableError, and an invalid address to UserError."""
    try:
        yield
    except httpx2.TransportError as error:
        raise RetryableError(f"{type(error).__name__}: {error}") from error
    except httpx2.InvalidURL as error:
        raise UserError(
            f"invalid address: {error}", where=url[:200], expected="https://HOST/PATH",
            remedy="correct the address",
        ) from error  # fmt: skip


def _get_retry_after(response: httpx2.Response) -> float | None:
    seconds = parse_int(response.headers.get("retry-after", ""))
    return None if seconds is None else float(seconds)


def _read_limited(response: httpx2.Response) -> bytes:
    content = b""
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            break
    return content


def _is_not_modified(response: httpx2.Response, etag: str) -> bool:
    return response.status_code == 304 or get_etag(response) == etag


def get_etag(response: httpx2.Response) -> str:
    """Return the ETag of a response, or its Last-Modified date."""
    etag: str = response.headers.get("etag", "") or response.headers.get("last-modified", "")
    return etag if etag.isascii() else ""


def parse_int(text: str) -> int | None:
    """Parse a header with decimal ASCII digits; None for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def strip_query(url: str) -> str:
    """Remove the query of an address, which may contain a signature."""
    return url.partition("?")[0]


def join_url(base: str, location: str) -> str:
    """Resolve the location of a redirect."""
    try:
        return urljoin(base, location)
    except ValueError:  # rejected later like any invalid address
        return location
