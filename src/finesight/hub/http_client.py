"""HTTP client for hubs and allowed web hosts.

It validates redirects, retries temporary failures, and reports all others as UserError.
"""

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
"""Timeout of a single read in seconds; a complete response may take longer."""

MAX_REDIRECTS = 10
MAX_JSON_BYTES = 64 * 2**20
"""Maximum size of a JSON response; one page of a file listing has a few hundred KB."""

MAX_ERROR_BYTES = 4096
"""Maximum number of bytes of an error response that are read."""

RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes of temporary failures, after which a request is retried."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Delays before successive retries in seconds."""

MAX_RETRY_DELAY_S = 60.0
"""Maximum delay in seconds that a server may request with Retry-After.

If a server requests a longer delay, the request fails.
"""

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
"""Networks without public hosts: special-purpose (RFC 6890) and multicast networks.

They are listed here because `ipaddress.is_global` differs between Python versions. IPv6 networks
outside of PUBLIC_IPV6 are omitted.
"""

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Network of global unicast addresses, the only public addresses of IPv6.

Loopback and link-local addresses and mapped IPv4 addresses are outside of it.
"""
_TRUE_VALUES = frozenset({"1", "ON", "YES", "TRUE"})


ReadT = TypeVar("ReadT")


class RetryableError(Exception):
    """Raised after a temporary failure of a server or connection.

    `retry_after` is the delay in seconds that the server requests, or None.
    """

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        self.what, self.retry_after = what, retry_after
        super().__init__(what)

    def retry_delay(self, num_failures: int) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        With 0 failures (some bytes were received), the next attempt is immediate unless the server
        requests a delay.
        """
        if num_failures > len(RETRY_DELAYS_S) or (self.retry_after or 0) > MAX_RETRY_DELAY_S:
            return None
        return max(
            RETRY_DELAYS_S[num_failures - 1] if num_failures else 0.0, self.retry_after or 0.0
        )


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


def is_offline() -> bool:
    """Return whether the environment variable HF_HUB_OFFLINE disables all requests."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE_VALUES


class HttpClient:
    """HTTP client of one site.

    In offline mode, every request raises UserError.
    """

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
        """Send a GET request, follow allowed redirects, and yield the response before its body.

        Raises:
            UserError: A redirect is not allowed, or the server rejects the request.
            RetryableError: The failure is temporary.
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
        """Send a GET request with retries and parse the JSON response.

        Raises:
            UserError: The server rejects the request or does not respond, or the response is not
                JSON.
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
        """Ask the server whether a file still has the given ETag or Last-Modified date.

        Raises:
            UserError: The server rejects the request or does not respond.
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
        """Send a GET request with retries and return the result of `read_response`."""
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
    """Return whether a request to `original` may be redirected to `target`.

    Rejects protocols other than HTTP and HTTPS, downgrades from HTTPS to HTTP, and hosts that are
    neither listed nor public.

    Args:
        original: URL of the request.
        target: URL of the redirect, or the original URL.
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
    """Convert connection errors to RetryableError, and an invalid URL to UserError."""
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
    """Return the ETag of a response, else its Last-Modified date, else an empty string."""
    etag: str = response.headers.get("etag", "") or response.headers.get("last-modified", "")
    return etag if etag.isascii() else ""


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
