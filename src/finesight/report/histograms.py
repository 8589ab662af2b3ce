"""Histograms of token counts and image sizes, for the comparison of runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from finesight.report.charts import (
    HEIGHT,
    MARGIN_BOTTOM,
    MARGIN_LEFT,
    MARGIN_RIGHT,
    MARGIN_TOP,
    WIDTH,
    AxisTick,
    Chart,
    ChartData,
    ChartLine,
    SeriesData,
    compute_ticks,
    format_exact,
)
from finesight.report.i18n import translate

HistogramCounts = Mapping[str, int]
"""Number of values by bin. A bin is half an octave wide.

Bin k covers values from 2^(k/2) to below 2^((k+1)/2). Keys are strings, as in JSON.
"""


def count_half_octaves(values: Iterable[int]) -> dict[str, int]:
    """Count positive integers by bins of half an octave (`HistogramCounts`)."""
    counts = Counter(math.floor(2 * math.log2(value) + 1e-9) for value in values if value > 0)
    return {str(bin_index): counts[bin_index] for bin_index in sorted(counts)}


def parse_counts(content: object) -> HistogramCounts:
    """Return the valid bins of a histogram that a run has recorded."""
    items = content if isinstance(content, dict) else {}
    return {
        name: count
        for name, count in items.items()
        if isinstance(name, str)
        and name.isdecimal()
        and int(name) < 120
        and isinstance(count, int)
        and count > 0
    }


def build_histogram(
    title: str, caption: str, counts_by_run: Sequence[tuple[str, HistogramCounts]]
) -> Chart | None:
    """Build a chart of histograms in percent, with one step line per run.

    Runs without values are omitted. Returns None if no run has values.
    """
    nonempty = [(name, counts) for name, counts in counts_by_run if counts]
    if not nonempty:
        return None
    low = min(int(bin_index) for _, counts in nonempty for bin_index in counts)
    high = max(int(bin_index) for _, counts in nonempty for bin_index in counts)
    percentages = [
        (
            name,
            [
                100 * counts.get(str(bin_index), 0) / sum(counts.values())
                for bin_index in range(low, high + 1)
            ],
        )
        for name, counts in nonempty
    ]
    y_tick_values = compute_ticks(
        0.0, max(max(values) for _, values in percentages), 4, include_ends=True
    )
    edges = [math.ceil(2 ** (bin_index / 2) - 1e-9) for bin_index in range(low, high + 2)]
    label_interval = max(1, math.ceil(len(edges) / 7))
    scale = _HistogramScale(len(edges) - 1, y_tick_values[-1])
    return Chart(
        title=title,
        caption=caption,
        summary=_summarize_histogram(title, percentages, edges),
        lines=tuple(
            ChartLine(name, "line", scale.build_path(values), (), ())
            for name, values in percentages
        ),
        x_ticks=tuple(
            AxisTick(scale.to_x(bin_index), f"{edge:,}")
            for bin_index, edge in enumerate(edges)
            if bin_index % label_interval == 0
        ),
        y_ticks=tuple(AxisTick(scale.to_y(value), f"{value:g} %") for value in y_tick_values),
        data=ChartData(
            x=[-0.5, len(edges) - 1.5],
            y=[0.0, y_tick_values[-1]],
            series=[
                SeriesData(
                    name=name,
                    points=[
                        (bin_index, value, f"{format_exact(value)} %")
                        for bin_index, value in enumerate(values)
                    ],
                )
                for name, values in percentages
            ],
            labels=[
                translate("{:,} to {:,}", lower, upper - 1) if upper - 1 > lower else f"{lower:,}"
                for lower, upper in pairwise(edges)
            ],
        ),
    )


class _HistogramScale:
    def __init__(self, num_bins: int, max_percentage: float) -> None:
        self._num_bins, self._max_percentage = num_bins, max_percentage

    def to_x(self, edge: int) -> float:
        return round(MARGIN_LEFT + edge / self._num_bins * (WIDTH - MARGIN_LEFT - MARGIN_RIGHT), 1)

    def to_y(self, percentage: float) -> float:
        return round(
            HEIGHT
            - MARGIN_BOTTOM
            - percentage / self._max_percentage * (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM),
            1,
        )

    def build_path(self, percentages: Sequence[float]) -> str:
        segments = [f"M{self.to_x(0):g} {self.to_y(0):g}"]
        segments += [
            f"V{self.to_y(value):g}H{self.to_x(bin_index + 1):g}"
            for bin_index, value in enumerate(percentages)
        ]
        return "".join([*segments, f"V{self.to_y(0):g}"])


def _summarize_histogram(
    title: str, percentages: Sequence[tuple[str, Sequence[float]]], edges: list[int]
) -> str:
    descriptions = []
    for name, values in percentages:
        bin_index = max(range(len(values)), key=values.__getitem__)
        descriptions.append(
            translate(
                "{} mostly {:,} to {:,}",
                name,
                edges[bin_index],
                max(edges[bin_index], edges[bin_index + 1] - 1),
            )
        )
    return translate("{}: {}", title, translate("; ").join(descriptions))
