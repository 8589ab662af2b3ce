"""Fetch images from allowed web hosts, protected against server-side request forgery (SSRF).

A host name is resolved once per request. All of its addresses must be public, and the connection
uses a checked address, so that DNS rebinding has no effect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx2

from finesight import __version__
from finesight.errors import UserError
from finesight.hub.url_policy import (
    is_allowed_url,
    is_offline,
    is_public_address,
    join_url,
    parse_int,
)

MAX_REDIRECTS = 5
CONTENT_TYPE_PREFIXES = ("image/", "application/octet-stream", "binary/octet-stream")
"""Accepted prefixes of the HTTP content type of an image."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
ResolveFn = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve_host(host: str, port: int) -> list[str]:
    """Resolve a host name to IP addresses with the resolver of the system."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in addresses]


class ImageFetcher:
    """Fetches images over HTTPS from allowed hosts, with limits on size and time.

    Args:
        hosts: Allowed host names.
        timeout_s: Time limit of a fetch, including redirects.
        max_bytes: Maximum file size.
        resolve: Resolves a host name and port to IP addresses.
        is_allowed_address: Checks an IP address before the connection.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        timeout_s: float,
        max_bytes: int,
        resolve: ResolveFn = resolve_host,
        is_allowed_address: Callable[[IpAddress], bool] = is_public_address,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        self._resolve, self._is_allowed_address = resolve, is_allowed_address
        self._ssl_context = ssl.create_default_context() if hosts else None

    async def fetch(self, url: str, file: BinaryIO) -> None:
        """Fetch an image and write it to a file.

        Raises:
            UserError: The scheme, host or address of the URL or of a redirect is not allowed, or
                the response is too large, too slow or not an image.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._follow_redirects(url, file)
        except TimeoutError as error:
            raise _fetch_error(f"timeout after {self._timeout_s:g} seconds") from error
        except (httpx2.TransportError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise _fetch_error(type(error).__name__) from error

    async def _follow_redirects(self, url: str, file: BinaryIO) -> None:
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            host, port = self._check_url(url, target)
            address = await self._resolve_address(host, port)
            redirect_url = await self._request(target, host, address, file)
            if redirect_url is None:
                return
            target = join_url(target, redirect_url)
        raise _fetch_error(f"more than {MAX_REDIRECTS} redirects")

    def _check_url(self, original_url: str, target_url: str) -> tuple[str, int]:
        try:
            is_allowed = is_allowed_url(original_url, target_url, self._hosts)
        except ValueError:  # invalid port, address or name
            is_allowed = False
        parts = urlsplit(target_url) if is_allowed else urlsplit("")
        if is_offline() or not is_allowed or parts.hostname is None:
            raise UserError(
                "image URLs are disabled because HF_HUB_OFFLINE is set"
                if is_allowed
                else "image URL or its redirect is not allowed",
                where="image_url",
                expected="a data URL, or https:// and a host that the server allows"
                " (--allow-media-host)",
                remedy="Send the image as a data URL, or upload it to /v1/files.",
            )
        return parts.hostname, parts.port or 443

    async def _resolve_address(self, host: str, port: int) -> str:
        """Resolve a host name to one IP address after checking all of its addresses."""
        addresses = await self._resolve(host, port)
        # An address may contain a local zone: fe80::1%eth0.
        if not addresses or not all(
            self._is_allowed_address(ipaddress.ip_address(a)) for a in addresses
        ):
            raise UserError(
                "image host has no public address",
                where="image_url",
                expected="a host with public addresses only",
                remedy="Send the image as a data URL, or upload it to /v1/files.",
            )
        return addresses[0]

    async def _request(self, url: str, host: str, address: str, file: BinaryIO) -> str | None:
        """Send one request and write the response to the file.

        Returns the target of a redirect, or None after the file is written.
        """
        assert self._ssl_context is not None, f"{host} is allowed without allowed hosts"
        connect_url = httpx2.URL(url).copy_with(host=address)
        headers = {
            "Host": urlsplit(url).netloc,
            "User-Agent": f"finesight/{__version__}",
            "Accept-Encoding": "identity",
        }
        # trust_env=False: a proxy would resolve the name again.
        async with (
            httpx2.AsyncClient(verify=self._ssl_context, trust_env=False) as client,
            client.stream(
                "GET", connect_url, headers=headers, extensions={"sni_hostname": host}
            ) as response,
        ):
            if response.has_redirect_location:
                return str(response.headers["location"])
            content_type = response.headers.get("content-type", "").lower()
            if response.status_code != 200 or not content_type.startswith(CONTENT_TYPE_PREFIXES):
                raise _fetch_error(
                    f"status {response.status_code}, content type {content_type[:40]!r}"
                )
            content_length = parse_int(response.headers.get("content-length", ""))
            num_bytes = content_length or 0
            async for chunk in response.aiter_raw():
                num_bytes = max(num_bytes, file.tell() + len(chunk))
                if num_bytes > self._max_bytes:
                    break
                file.write(chunk)
        if num_bytes > self._max_bytes:
            raise _fetch_error(f"at least {num_bytes} bytes; expected at most {self._max_bytes}")
        return None


def _fetch_error(what: str) -> UserError:
    return UserError(
        f"image could not be fetched: {what}",
        where="image_url",
        expected="an image at the URL",
        remedy="Send the image as a data URL, or upload it to /v1/files.",
    )
