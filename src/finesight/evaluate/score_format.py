"""Format scores with as many digits as their number of samples supports."""

from __future__ import annotations

import math

MIN_DIGITS = 2
MAX_DIGITS = 4
"""Digits after the point of a score below 10. Without a number of samples, there are four."""


def format_score(value: float, num_samples: int | None = None) -> str:
    """Format a score. Its standard error is about 0.5 / sqrt(number of samples).

    There are two digits after the point for 100 samples, and one more for 10,000. Values from 10
    have one digit less for each further digit before the point. A score that is not 0 or 1 has more
    digits if it would be displayed as such.

    Args:
        num_samples: Number of samples of the score. Unknown if it is None or not positive.
    """
    digits = MAX_DIGITS
    if num_samples is not None and num_samples > 0:
        digits = min(MAX_DIGITS, max(MIN_DIGITS, 1 + int(math.log10(num_samples) / 2)))
    magnitude = abs(value)
    if magnitude >= 10 and math.isfinite(value):
        digits = max(0, digits - int(math.log10(magnitude)))
    elif magnitude not in (0, 1):
        while digits < MAX_DIGITS and round(magnitude, digits) in (0, 1):
            digits += 1
    if round(value, digits) == 0:
        value = 0.0  # Without the sign of a rounded value.
    return f"{value:,.{digits}f}"


def format_score_change(value: float, num_samples: int | None = None) -> str:
    """Format the difference of a score with its sign."""
    text = format_score(value, num_samples)
    return text if text.startswith("-") else f"+{text}"


def format_score_interval(interval: tuple[float, float], num_samples: int | None = None) -> str:
    """Format the bounds of the interval of a score."""
    low, high = interval
    return f"{format_score(low, num_samples)} to {format_score(high, num_samples)}"
