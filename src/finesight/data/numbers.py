"""Whole numbers in texts of others."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"[0-9]{1,18}")


def whole_number(text: str) -> int | None:
    """Return the number that up to 18 plain digits stand for; None for all else."""
    return int(text) if _DIGITS.fullmatch(text) else None
