"""Verify passwords and API keys in constant time, and limit wrong ones.

Right credentials are always accepted: whoever guesses cannot lock the owner out. Their length makes
guesses hopeless, and the limit keeps guesses from using up the server.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import math
import os
import stat
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MAX_WRONG_GUESSES = 30
"""Maximum number of wrong credentials of all clients within `GUESS_WINDOW_S`."""

MAX_WRONG_GUESSES_PER_ADDRESS = 10
"""Maximum number of wrong credentials of one address within `GUESS_WINDOW_S`."""

GUESS_WINDOW_S = 60.0


MAX_SECRET_FILE_BYTES = 1 << 20


def read_secret_file(file: Path) -> str:
    """Read a text file with keys or a password, which may be a pipe.

    Raises OSError for an unreadable or larger file, and UnicodeDecodeError.
    """
    with file.open("rb") as stream:
        content = stream.read(MAX_SECRET_FILE_BYTES + 1)
    if len(content) > MAX_SECRET_FILE_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return content.decode()


def is_readable_by_others(file: Path) -> bool:
    """Return whether other users of the machine can read a regular file."""
    state = file.stat()
    return stat.S_ISREG(state.st_mode) and bool(state.st_mode & 0o044)


class Credentials:
    """Secrets of a server, compared as digests in constant time, and the budget of wrong ones."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._digests = [_digest(secret) for secret in secrets]
        self._wrong: deque[tuple[float, str]] = deque()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find_owner(self, secret: str) -> str | None:
        """Return a name for the owner of a secret, or None for a wrong one. All are compared."""
        digest = _digest(secret)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if any(matches) else None

    def count_wrong(self, address: str) -> int:
        """Count a wrong secret from an address.

        Returns:
            0 within the budgets of all addresses and of the network of this one, else the seconds
            until the oldest wrong secret of an exceeded budget is no longer counted.
        """
        now = time.monotonic()
        network = _find_network(address)
        while self._wrong and self._wrong[0][0] <= now - GUESS_WINDOW_S:
            self._wrong.popleft()
        times = [time_s for time_s, _ in self._wrong]
        own_times = [time_s for time_s, known in self._wrong if known == network]
        oldest = []
        if len(times) >= MAX_WRONG_GUESSES:
            oldest.append(times[0])
        if len(own_times) >= MAX_WRONG_GUESSES_PER_ADDRESS:
            oldest.append(own_times[0])
        if not oldest:
            self._wrong.append((now, network))
            return 0
        return math.ceil(max(oldest) + GUESS_WINDOW_S - now)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _find_network(address: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 address.

    One host may own the whole network.
    """
    with suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv4Address):
            return str(ip)
        if ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((ip, 64), strict=False))
        return str(ip.ipv4_mapped)
    return address
