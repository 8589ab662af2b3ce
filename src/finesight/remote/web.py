"""Requests over HTTP: who may answer, redirects followed one by one, refusals in words."""

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

# Also what huggingface_hub sends its requests with.
import httpx2

from finesight import __version__
from finesight.bounded_files import parse_json
from finesight.errors import UserError

CONNECT_SECONDS = 15.0
READ_SECONDS = 60.0
"""How long one piece of an answer may take to come, not the whole."""

REDIRECTS = 10
LARGEST_JSON = 64 * 2**20
"""Bytes; a page of a listing has a few hundred kilobytes."""

LARGEST_REFUSAL = 4096
"""Bytes of what a server says with a refusal, as they come, whatever they would unpack to."""

LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses by which a server says that the same request may be answered later."""

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt of a request that failed."""

LONGEST_PAUSE = 60.0
"""Seconds; where a server asks for more, no further attempt is made."""

INNER = frozenset({"localhost", "local", "lan", "internal", "intranet", "home", "corp", "arpa"})
"""Last parts of names that are given within networks alone."""

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
"""Networks of the IANA special-purpose address registries (RFC 6890) and multicast: none holds one
host of the public network. What `ipaddress` knows of them depends on the version of Python. Of
IPv6, those within PUBLIC_IPV6."""

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Global unicast, all that is allocated of it: loopback, translations and local networks lie
outside."""
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


Read = TypeVar("Read")


class TryAgain(Exception):
    """The server, or the way to it, failed for now. `wait` is the seconds it asked for, if any."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        self.what, self.wait = what, wait
        super().__init__(what)

    def pause(self, failures: int) -> float | None:
        """Seconds until the next attempt after so many failures in a row; None for no further
        one. After none, as when bytes came before the failure, at once."""
        if failures > len(PAUSES) or (self.wait or 0) > LONGEST_PAUSE:
            return None
        return max(PAUSES[failures - 1] if failures else 0.0, self.wait or 0.0)


@dataclass(frozen=True, slots=True)
class Site:
    """Whom requests go to. `headers`, which may hold a token, go to the host of the first address
    of a request alone, never to where it redirects.

    `hosts` are all hosts that may answer. None, for a hub, are the first address's own host and,
    by HTTPS, any public one: hubs keep large files elsewhere. `refusal` words a status from 400 on
    and the beginning of what the server says with it.
    """

    refusal: Callable[[httpx2.Response, str], UserError]
    headers: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] | None = None


def offline() -> bool:
    """Whether the user wants no request to be sent: HF_HUB_OFFLINE, to whatever hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


class Web:
    """A client for one site. Raises UserError at any request while `offline`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._client = httpx2.Client(
            follow_redirects=False,
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            # Sizes, ranges and digests are of the file, so that nothing may compress it on its way.
            headers={"User-Agent": f"finesight/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *problem: object) -> None:
        self._client.close()

    @contextlib.contextmanager
    def answer(
        self, url: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """The answer to a GET, its body not yet read, after redirects to allowed places.

        Raises UserError for a place that is not allowed and for a refusal, TryAgain for a failure
        that may pass.
        """
        _refuse_offline(url)
        target = url
        for _ in range(REDIRECTS):
            self._check(url, target)
            same = urlsplit(target).netloc == urlsplit(url).netloc
            own = self._site.headers if same else {}
            with _passing(target), contextlib.ExitStack() as stack:
                response = stack.enter_context(
                    self._client.stream("GET", target, headers={**own, **(headers or {})})
                )
                if response.has_redirect_location:
                    target = joined(target, response.headers["location"])
                    continue
                if response.status_code in LATER:
                    raise TryAgain(f"status {response.status_code}", _asked_wait(response))
                if response.status_code >= 400 and response.status_code != 416:
                    said = next(response.iter_raw(), b"")[:LARGEST_REFUSAL]
                    raise self._site.refusal(response, said.decode("utf-8", "replace"))
                yield response
                return
        raise UserError(
            f"more than {REDIRECTS} redirects",
            where=url,
            expected="the file, or a way to it",
            remedy="download the file elsewhere and give its path",
        )

    def json(self, url: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON that a GET is answered with, asked again after failures that may pass.

        Raises UserError for a refusal, other content, and a server that stays silent.
        """
        full = f"{url}?{urlencode(params)}" if params else url
        content = self._content(full)
        try:
            return parse_json(content)
        except ValueError as error:
            raise UserError(
                f"an answer that is no JSON: {content[:60]!r}",
                where=full,
                expected="the answer of a hub",
                remedy="check the address of the hub (HF_ENDPOINT, MODELSCOPE_ENDPOINT) and the"
                " proxy",
            ) from error

    def unchanged(self, url: str, mark: str) -> bool:
        """Whether the file at an address still is the one of an answer that had the `mark`.

        Raises UserError as `json` does.
        """
        asked = {"If-None-Match" if '"' in mark else "If-Modified-Since": mark}
        return self._patiently(url, asked, lambda answer: _is_same(answer, mark))

    def _content(self, url: str) -> bytes:
        return self._patiently(url, {}, _beginning)

    def _patiently(
        self, url: str, headers: Mapping[str, str], read: Callable[[httpx2.Response], Read]
    ) -> Read:
        """What `read` makes of the answer, asked again after failures that may pass."""
        for failures in itertools.count(1):
            try:
                with self.answer(url, headers) as response:
                    return read(response)
            except TryAgain as failure:
                seconds = failure.pause(failures)
                if seconds is None:
                    raise UserError(
                        f"no answer: {failure.what}",
                        where=url,
                        expected="an answer by the server",
                        remedy="check the connection and start again, what is there is kept; with"
                        " HF_HUB_OFFLINE=1 what was downloaded before is used",
                    ) from failure
                time.sleep(seconds)
        raise AssertionError("counting ended")

    def _check(self, first: str, target: str) -> None:
        try:
            fits = allowed(first, target, self._site.hosts)
        except ValueError:  # a port, an address or a name that is none
            fits = False
        if not fits:
            redirected = "" if first == target else f", to which {urlsplit(first).netloc} redirects"
            raise UserError(
                f"{without_query(target)[:200]} is not asked{redirected}",
                where=without_query(first)[:200],
                expected=f"an answer by {', '.join(sorted(self._site.hosts))} over https"
                if self._site.hosts is not None
                else "an answer by the hub, or by a public host over https",
                remedy="if you trust that host, name it with --allow-host"
                if self._site.hosts is not None
                else "check the address of the hub (HF_ENDPOINT, MODELSCOPE_ENDPOINT)",
            )


def allowed(first: str, target: str, hosts: frozenset[str] | None) -> bool:
    """Whether `target` may be asked in place of `first`: never another protocol, never from HTTPS
    back to HTTP, never an address inside of a network that the user did not name."""
    start, end = urlsplit(first), urlsplit(target)
    host = (end.hostname or "").lower()
    # Read to raise ValueError for a port and for a name that is none.
    if not host or end.username is not None or end.port == 0 or not host.encode("idna"):
        return False
    if hosts is not None:
        return end.scheme == "https" and host in hosts
    if host == (start.hostname or "").lower():
        return end.scheme == "https" or (end.scheme == start.scheme == "http")
    # A name that leads to an inner address has no certificate for it, so that HTTPS keeps it off.
    return end.scheme == "https" and _is_public(host)


def _is_public(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # 2130706433 and 0x7f.1 are addresses too; a name ends in letters.
        first, _, last = host.removesuffix(".").rpartition(".")
        return bool(first) and last not in INNER and (last.isalpha() or last.startswith("xn--"))
    return public_address(address)


def public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one host of the public network."""
    if isinstance(address, ipaddress.IPv6Address) and address not in PUBLIC_IPV6:
        return False
    special = any(address in network for network in SPECIAL_NETWORKS)
    return address.is_global and not special


def _refuse_offline(url: str) -> None:
    if offline():
        raise UserError(
            f"{url[:200]} would have to be asked, and HF_HUB_OFFLINE is set",
            where="offline mode",
            expected="what was downloaded before",
            remedy="unset HF_HUB_OFFLINE, or download it on another machine and give its folder",
        )


@contextlib.contextmanager
def _passing(url: str) -> Iterator[None]:
    """Turn what the network does into TryAgain, and an address that is none into UserError."""
    try:
        yield
    except httpx2.TransportError as error:
        raise TryAgain(f"{type(error).__name__}: {error}") from error
    except httpx2.InvalidURL as error:
        raise UserError(
            f"no address: {error}", where=url[:200], expected="https://HOST/PATH",
            remedy="correct it",
        ) from error  # fmt: skip


def _asked_wait(response: httpx2.Response) -> float | None:
    seconds = whole_number(response.headers.get("retry-after", ""))
    return None if seconds is None else float(seconds)


def _beginning(response: httpx2.Response) -> bytes:
    content = b""
    for piece in response.iter_raw():
        content += piece
        if len(content) > LARGEST_JSON:
            break
    return content


def _is_same(response: httpx2.Response, mark: str) -> bool:
    return response.status_code == 304 or mark_of(response) == mark


def mark_of(response: httpx2.Response) -> str:
    """What the server tells a file's versions apart by, or when it says that it was changed."""
    mark: str = response.headers.get("etag", "") or response.headers.get("last-modified", "")
    return mark if mark.isascii() else ""


def whole_number(text: str) -> int | None:
    """The number that a header gives in plain digits; None for all else, also other digits."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def without_query(url: str) -> str:
    """An address that may be shown: what signs it, so that whoever has it may ask, is cut."""
    return url.partition("?")[0]


def joined(base: str, location: str) -> str:
    """Where a redirect leads."""
    try:
        return urljoin(base, location)
    except ValueError:  # refused as it is, like any address that is none
        return location
