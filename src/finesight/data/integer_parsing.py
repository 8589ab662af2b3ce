"""Parse integers in untrusted text."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"[0-9]{1,18}")


def parse_integer(text: str) -> int | None:
    """Parse an integer of up to 18 ASCII digits; return None for any other text."""
    return int(text) if _DIGITS.fullmatch(text) else None
