"""Files from the web, on the user's word: over HTTPS, from hosts that are named, up to a size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import unquote, urlsplit

import httpx2

from finesight.errors import UserError
from finesight.remote.download import download
from finesight.remote.transfer import RemoteFile, bring, renew
from finesight.remote.web import Site, Web, without_query

LARGEST = 50 * 10**9
"""Bytes that are taken from one address."""

LARGEST_PICTURE = 200 * 10**6

_DIGEST = re.compile(r"sha256=([0-9a-fA-F]{64})")


def is_address(source: str) -> bool:
    """Whether a source is an address on the web, of whatever kind."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def fetch_address(source: str, hosts: Sequence[str], folder: Path) -> Path:
    """The file at https://HOST/PATH, below `folder`, by its own name.

    `hosts` are those that may answer. #sha256=HEX at the end of the address has the file verified;
    without, the server is asked whether one that is there is still the same.
    Raises UserError for another protocol, another host, also by a redirect, and a file that cannot
    be had or is too large.
    """
    address, _, fragment = source.partition("#")
    allowed = frozenset(host.lower() for host in hosts)
    host = _check(address, allowed)
    digest = _DIGEST.fullmatch(fragment)
    if fragment and digest is None:
        raise UserError(
            f"{fragment[:80]!r} after the # of the address",
            where=source[:200],
            expected="#sha256= and 64 digits in hexadecimal, or nothing",
            remedy="correct it, or leave it out",
        )
    name = PurePosixPath(unquote(urlsplit(address).path)).name or "file"
    place = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    sha256 = digest[1] if digest else None
    file = RemoteFile(name, address, sha256=sha256, limit=LARGEST, changing=not sha256)
    with Web(Site(_refusal, hosts=allowed)) as web:
        if file.changing:
            renew(file, place / name, web)
        download([file], place, web, host)
    return place / name


def _check(address: str, hosts: frozenset[str]) -> str:
    """The host of an address that may be asked. Raises UserError for any other."""
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme.lower() != "https" or not parts.hostname:
        raise UserError(
            f"{address[:200]!r} is no address that is fetched",
            where="SOURCE",
            expected="https://HOST/PATH, hf:OWNER/NAME, modelscope:OWNER/NAME, or a path",
            remedy="download it yourself and give its path",
        )
    if parts.hostname.lower() not in hosts:
        raise UserError(
            f"nothing is fetched from {parts.hostname} unless you say so",
            where=address[:200],
            expected="--allow-host for every host that is to be asked, also by redirects",
            remedy=f"if you trust it: --allow-host {parts.hostname}",
        )
    return parts.hostname


def _refusal(response: httpx2.Response, said: str) -> UserError:
    return UserError(
        f"the server refuses with status {response.status_code}",
        where=without_query(str(response.request.url))[:200],
        expected="the file",
        remedy="check the address; where a login is needed, download it yourself and give its path",
    )


class Pictures:
    """Single pictures from the web that rows name, kept below `folder` for the next import, which
    asks whether they are still the same."""

    def __init__(self, hosts: Sequence[str], folder: Path) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._folder = folder
        self._web = Web(Site(_refusal, hosts=self._hosts))
        self._stop = Event()
        self._taken: set[str] = set()

    def take(self, address: str) -> Path:
        """The file at an address of an allowed host. Raises UserError as `fetch_address` does."""
        _check(address, self._hosts)
        place = self._folder / hashlib.sha256(address.encode()).hexdigest()
        file = RemoteFile(address, address, limit=LARGEST_PICTURE, changing=True)
        if address not in self._taken:
            renew(file, place, self._web)
        bring(file, place, self._web, _unseen, self._stop)
        self._taken.add(address)
        return place


def _unseen(count: int) -> None:
    """Single pictures move no bar."""
