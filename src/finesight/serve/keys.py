"""Keys that open the server, and the hosts on which it needs none."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from finesight.errors import UserError

VARIABLE = "FINESIGHT_KEY"
SHORTEST = 16


class Keys:
    """Keys of clients; without any, everyone who reaches the server is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """Who asks: a name made from the key in `Authorization: Bearer KEY`, None for a wrong one
        or none. Each key is compared in full, and all of them: the time says nothing."""
        if not self._digests:
            return "everyone"
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:16] if any(fits) and scheme.lower() == "bearer" else None


def read_keys(file: Path | None) -> list[str]:
    """The keys of a file, one a line, or of the environment's FINESIGHT_KEY; blank lines and those
    that begin with # are passed over. Raises UserError for a short key and a file without any."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot be read ({error})",
                where=str(file),
                expected="a text file with a key on each line",
                remedy="correct the path",
            ) from error
    else:
        lines = os.environ.get(VARIABLE, "").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    where = str(file) if file else VARIABLE
    for number, key in enumerate(keys, 1):
        # Also what an HTTP header can hold.
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"key {number} has {len(key)} characters, or other ones than keys have",
                where=where,
                expected=f"at least {SHORTEST} letters, digits and signs of ASCII without spaces",
                remedy="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    if file is not None and not keys:
        raise UserError(
            f"{len(lines)} lines and no key",
            where=where,
            expected="a key on a line",
            remedy="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return keys


def check_reach(host: str, keys: Sequence[str]) -> None:
    """Raise UserError where others could reach the server without a key."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"{host} is reached from other machines, and there is no key",
            where="--host",
            expected=f"a key in --key-file or {VARIABLE}, or the host 127.0.0.1",
            remedy="python -c 'import secrets; print(secrets.token_urlsafe(32))' > keys.txt, then"
            " --key-file keys.txt",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
