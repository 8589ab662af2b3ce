"""Rules for HTTP requests: offline mode, allowed hosts and public addresses."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urljoin, urlsplit

from finesight.errors import UserError

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
