"""Histograms of sizes, such as tokens per sample, with bins of half an octave."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

HistogramCounts = Mapping[str, int]
"""Number of values by bin. Bin k covers values from 2^(k/2) to below 2^((k+1)/2)."""


def count_half_octaves(values: Iterable[int]) -> dict[str, int]:
    """Count positive integers by bins of half an octave (`HistogramCounts`)."""
    counts = Counter(math.floor(2 * math.log2(value) + 1e-9) for value in values if value > 0)
    return {str(bin_index): counts[bin_index] for bin_index in sorted(counts)}
