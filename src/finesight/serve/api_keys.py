"""API keys of the inference server, and the rule which hosts require a key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from finesight.errors import UserError

API_KEY_VARIABLE = "FINESIGHT_KEY"
GENERATE_KEY_COMMAND = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
MIN_KEY_LENGTH = 16


class ApiKeys:
    """Authenticates clients by API key. Without keys, every client is accepted."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_hash_key(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def authenticate(self, authorization: str | None) -> str | None:
        """Return the owner name of an API key, or None if the key is invalid.

        The comparison takes constant time: all keys are always compared.

        Args:
            authorization: Value of the HTTP header, `Bearer KEY`. None if it is missing.
        """
        if not self._digests:
            return "everyone"
        scheme, _, key = (authorization or "").partition(" ")
        digest = _hash_key(key.strip())
        matches = [hmac.compare_digest(digest, known_digest) for known_digest in self._digests]
        return digest.hex()[:16] if any(matches) and scheme.lower() == "bearer" else None


def read_api_keys(file: Path | None) -> list[str]:
    """Read API keys from a file or from the environment variable `FINESIGHT_KEY`.

    There is one key per line. Blank lines and lines that start with # are ignored.

    Raises:
        UserError: The file is unreadable or has no key, or a key is invalid.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot be read ({error})",
                where=str(file),
                expected="a text file with one API key per line",
                remedy="Correct the path.",
            ) from error
    else:
        lines = os.environ.get(API_KEY_VARIABLE, "").splitlines()
    stripped_lines = (line.strip() for line in lines)
    keys = [line for line in stripped_lines if line and not line.startswith("#")]
    where = str(file) if file else API_KEY_VARIABLE
    for key_number, key in enumerate(keys, 1):
        # HTTP headers have the same restriction.
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"API key {key_number} is invalid ({len(key)} characters)",
                where=where,
                expected=f"at least {MIN_KEY_LENGTH} printable ASCII characters without spaces",
                remedy=f"Generate a key: {GENERATE_KEY_COMMAND}",
            )
    if file is not None and not keys:
        raise UserError(
            f"no API key in {len(lines)} lines",
            where=where,
            expected="one API key per line",
            remedy=f"Generate a key: {GENERATE_KEY_COMMAND}",
        )
    return keys


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """Raise UserError if other machines could reach the server without an API key."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"other machines can reach {host}, but there is no API key",
            where="--host",
            expected=f"an API key in --key-file or {API_KEY_VARIABLE}, or the host 127.0.0.1",
            remedy=f"Run {GENERATE_KEY_COMMAND} > keys.txt, then use --key-file keys.txt.",
        )


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine can reach the host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
