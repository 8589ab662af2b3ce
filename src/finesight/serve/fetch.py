"""Pictures from the web for strangers: from hosts that are named, at addresses that were checked.

A name is looked up once for each request, every address that it has must be of the public network,
and the connection goes to one that was checked: what the name means a moment later is not asked.
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
from finesight.remote.web import allowed, joined, offline, public_address, whole_number

REDIRECTS = 5
KINDS = ("image/", "application/octet-stream", "binary/octet-stream")
"""How the content types begin under which servers give pictures."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name, as this machine's resolver gives them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Takes files from `hosts` over HTTPS, up to `most` bytes and within `seconds`.

    `fits` says which addresses may be connected to, `resolve` what a name means.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        seconds: float,
        most: int,
        resolve: Resolve = resolved,
        fits: Callable[[Address], bool] = public_address,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._seconds, self._most = seconds, most
        self._resolve, self._fits = resolve, fits
        self._context = ssl.create_default_context() if hosts else None

    async def take(self, url: str, file: BinaryIO) -> None:
        """Write what is at `url` into `file`.

        Raises UserError for another protocol, a host that is not allowed, also by a redirect, an
        address inside of a network, and what is too large, too slow or no picture.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await self._follow(url, file)
        except TimeoutError as error:
            raise _failed(f"not there within {self._seconds:g} seconds") from error
        except (httpx2.TransportError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise _failed(type(error).__name__) from error

    async def _follow(self, url: str, file: BinaryIO) -> None:
        target = url
        for _ in range(REDIRECTS + 1):
            host, port = self._checked(url, target)
            address = await self._address(host, port)
            onward = await self._ask(target, host, address, file)
            if onward is None:
                return
            target = joined(target, onward)
        raise _failed(f"more than {REDIRECTS} redirects")

    def _checked(self, first: str, target: str) -> tuple[str, int]:
        try:
            fits = allowed(first, target, self._hosts)
        except ValueError:  # a port, an address or a name that is none
            fits = False
        parts = urlsplit(target) if fits else urlsplit("")
        if offline() or not fits or parts.hostname is None:
            raise UserError(
                "pictures are not fetched while HF_HUB_OFFLINE is set"
                if fits
                else "this picture's address, or one that it redirects to, is refused",
                where="image_url",
                expected="a data URL, or https:// and a host that the server allows"
                " (--allow-media-host)",
                remedy="send the picture as a data URL or upload it to /v1/files",
            )
        return parts.hostname, parts.port or 443

    async def _address(self, host: str, port: int) -> str:
        """An address of the host to connect to; all that it has are checked."""
        found = await self._resolve(host, port)
        # An address may name a zone of this machine: fe80::1%eth0.
        if not found or not all(self._fits(ipaddress.ip_address(a)) for a in found):
            raise UserError(
                "this picture's host has an address inside of a network, or none",
                where="image_url",
                expected="a host of the public network",
                remedy="send the picture as a data URL or upload it to /v1/files",
            )
        return found[0]

    async def _ask(self, url: str, host: str, address: str, file: BinaryIO) -> str | None:
        """Where the server redirects to, or None once the file is written."""
        assert self._context is not None, f"{host} is allowed though no host is"
        there = httpx2.URL(url).copy_with(host=address)
        headers = {
            "Host": urlsplit(url).netloc,
            "User-Agent": f"finesight/{__version__}",
            "Accept-Encoding": "identity",
        }
        # No proxy of the environment: it would look the name up once more.
        async with (
            httpx2.AsyncClient(verify=self._context, trust_env=False) as client,
            client.stream("GET", there, headers=headers, extensions={"sni_hostname": host}) as got,
        ):
            if got.has_redirect_location:
                return str(got.headers["location"])
            kind = got.headers.get("content-type", "").lower()
            if got.status_code != 200 or not kind.startswith(KINDS):
                raise _failed(f"status {got.status_code} and the content type {kind[:40]!r}")
            announced = whole_number(got.headers.get("content-length", ""))
            size = announced or 0
            async for piece in got.aiter_raw():
                size = max(size, file.tell() + len(piece))
                if size > self._most:
                    break
                file.write(piece)
        if size > self._most:
            raise _failed(f"{size} bytes or more, and {self._most} are taken")
        return None


def _failed(what: str) -> UserError:
    return UserError(
        f"the picture could not be had: {what}",
        where="image_url",
        expected="a picture at that address",
        remedy="send the picture as a data URL or upload it to /v1/files",
    )
