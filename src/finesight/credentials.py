"""Verify passwords and API keys in constant time, and limit wrong ones.

Right credentials are always accepted: whoever guesses cannot lock the owner out. Their length makes
guesses hopeless, and the limit keeps guesses from using up the server.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress

MAX_WRONG_GUESSES, MAX_WRONG_GUESSES_PER_ADDRESS = 30, 10
"""Wrong credentials within `GUESS_WINDOW_S`, of all clients and of one address."""

GUESS_WINDOW_S = 60.0


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
            0 within the budget, else the seconds until another wrong secret is within it.
        """
        now, network = time.monotonic(), _find_network(address)
        while self._wrong and self._wrong[0][0] <= now - GUESS_WINDOW_S:
            self._wrong.popleft()
        counts = Counter(known for _, known in self._wrong)
        if counts.total() < MAX_WRONG_GUESSES and counts[network] < MAX_WRONG_GUESSES_PER_ADDRESS:
            self._wrong.append((now, network))
            return 0
        return math.ceil(self._wrong[0][0] + GUESS_WINDOW_S - now)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _find_network(address: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 address, which one host may own."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        if isinstance(ip, ipaddress.IPv6Address) and mapped is None:
            return str(ipaddress.ip_network((ip, 64), strict=False))
        return str(mapped or ip)
    return address
