"""Charts for HTML pages in SVG coordinates: lines by step, and histograms.

A page draws axis ticks and downsampled lines. Its script shows values under the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal, NotRequired, TypedDict

from finesight.manifest import HistogramCounts
from finesight.report.i18n import translate
from finesight.report.metrics import format_metric_name, read_interval
from finesight.report.run_reader import JsonObject, RunRecord, is_finite

Point = tuple[float, float]
"""A (step, value) pair."""

MAX_POINTS = 1000
"""Maximum number of points of a line. A screen cannot show more."""

WIDTH, HEIGHT = 400.0, 220.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 10.0, 10.0, 24.0
"""Size and margins of a chart in SVG units, which are about one phone pixel."""


@dataclass(frozen=True)
class ChartSeries:
    """Input of a chart: one series of values by step.

    Attributes:
        style: `line`, `faint` (a line behind its smoothed series), or `marks` (a line with
            markers).
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "marks"] = "line"
    error_bars: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class AxisTick:
    """Tick of a chart axis."""

    offset: float
    label: str


@dataclass(frozen=True)
class ChartLine:
    """Drawn line of a chart, in SVG coordinates.

    Attributes:
        markers: Coordinates (x, y) of the markers.
        error_bars: Coordinates (x, y of high, y of low) of the error bars.
    """

    name: str
    style: str
    path: str
    markers: tuple[Point, ...]
    error_bars: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Chart for a page template, with all coordinates computed."""

    title: str
    caption: str
    summary: str
    lines: tuple[ChartLine, ...]
    x_ticks: tuple[AxisTick, ...]
    y_ticks: tuple[AxisTick, ...]
    data: ChartData


class ChartData(TypedDict):
    """Chart data for the JavaScript of the page, which shows values under the cursor.

    Attributes:
        labels: Texts for x values 0, 1, 2 and so on. Only histograms have them.
    """

    x: list[float]
    y: list[float]
    series: list[SeriesData]
    labels: NotRequired[list[str]]


class SeriesData(TypedDict):
    """Line in `ChartData`: its name, and points (x, y, formatted y)."""

    name: str
    points: list[tuple[float, float, str]]


def build_chart(title: str, series: Sequence[ChartSeries], caption: str = "") -> Chart | None:
    """Build a chart from all series that have points.

    Returns None if no series has points.
    """
    visible = [item for item in series if item.points]
    if not visible:
        return None
    downsampled = [downsample(item.points) for item in visible]
    steps = [step for item in visible for step, _ in item.points]
    values = [value for points in downsampled for _, value in points]
    values += [bound for item in visible for _, *bounds in item.error_bars for bound in bounds]
    x_low, x_high = min(steps), max(steps)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_tick_values = compute_ticks(min(values), max(values), 5, include_ends=True)
    x_tick_values = compute_ticks(x_low, x_high, 6, integer_only=True)
    scale = _AxisScale(x_low, x_high, y_tick_values[0], y_tick_values[-1])
    return Chart(
        title=title,
        caption=caption,
        summary=_summarize_chart(title, visible),
        lines=tuple(
            scale.build_line(item, points)
            for item, points in zip(visible, downsampled, strict=True)
        ),
        x_ticks=tuple(
            AxisTick(scale.to_x(value), format_compact(value)) for value in x_tick_values
        ),
        y_ticks=tuple(
            AxisTick(scale.to_y(value), label) for value, label in _format_ticks(y_tick_values)
        ),
        data=ChartData(
            x=[x_low, x_high],
            y=[y_tick_values[0], y_tick_values[-1]],
            series=[
                SeriesData(name=item.name, points=[(x, y, format_exact(y)) for x, y in points])
                for item, points in zip(visible, downsampled, strict=True)
            ],
        ),
    )


@dataclass(frozen=True)
class _AxisScale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def to_x(self, step: float) -> float:
        fraction = (step - self.x_low) / (self.x_high - self.x_low)
        return round(MARGIN_LEFT + fraction * (WIDTH - MARGIN_LEFT - MARGIN_RIGHT), 1)

    def to_y(self, value: float) -> float:
        fraction = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - MARGIN_BOTTOM - fraction * (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM), 1)

    def build_line(self, series: ChartSeries, points: Sequence[Point]) -> ChartLine:
        coordinates = [(self.to_x(x), self.to_y(y)) for x, y in points]
        return ChartLine(
            name=series.name,
            style=series.style,
            path="M" + "L".join(f"{x:g} {y:g}" for x, y in coordinates),
            # A line with one point is invisible without a marker.
            markers=tuple(coordinates) if series.style == "marks" or len(coordinates) == 1 else (),
            error_bars=tuple(
                (self.to_x(x), self.to_y(high), self.to_y(low))
                for x, low, high in series.error_bars
            ),
        )

    def build_step_path(self, values: Sequence[float]) -> str:
        """Return the path of a histogram line, one horizontal segment per value."""
        bottom = self.to_y(0)
        segments = [f"M{self.to_x(0):g} {bottom:g}"]
        segments += [
            f"V{self.to_y(value):g}H{self.to_x(index + 1):g}" for index, value in enumerate(values)
        ]
        return "".join([*segments, f"V{bottom:g}"])


def filter_finite(points: Iterable[tuple[object, object]]) -> list[Point]:
    """Return the points whose step and value are finite numbers.

    Steps with a non-finite loss record no value, and files of a run may contain invalid values.
    """
    return [(float(x), float(y)) for x, y in points if is_finite(x) and is_finite(y)]


def downsample(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """Reduce a line to at most `max_points` points without losing spikes.

    Keeps the minimum and maximum of each bucket of consecutive points.
    """
    if len(points) <= max_points:
        return list(points)
    downsampled = []
    num_buckets = max_points // 2
    for bucket_index in range(num_buckets):
        start = bucket_index * len(points) // num_buckets
        bucket = points[start : (bucket_index + 1) * len(points) // num_buckets]
        extremes = {min(bucket, key=itemgetter(1)), max(bucket, key=itemgetter(1))}
        downsampled += sorted(extremes)
    return downsampled


def smooth_points(points: Sequence[Point]) -> list[Point]:
    """Return an exponential moving average over about 1/40 of the points.

    It is bias-corrected as in Adam (Kingma & Ba 2015, section 3). Returns an empty list for fewer
    than 20 points.
    """
    if len(points) < 20:
        return []
    decay = 1 - 1 / max(5.0, len(points) / 40)
    total, weight, mean = 0.0, 0.0, []
    for step, value in points:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        mean.append((step, total / weight))
    return mean


def compute_ticks(
    low: float,
    high: float,
    num_ticks: int,
    *,
    integer_only: bool = False,
    include_ends: bool = False,
) -> list[float]:
    """Return about `num_ticks` round values for an axis from `low` to `high`.

    Args:
        include_ends: Add the next round values below `low` and above `high`.
    """
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (-1.0, 1.0)
    min_step = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= min_step * 0.999
    )
    if integer_only:
        step = max(1.0, round(step))
    first = math.floor(low / step) if include_ends else math.ceil(low / step)
    last = math.ceil(high / step) if include_ends else math.floor(high / step)
    return [multiple * step for multiple in range(first, last + 1)]


def _format_ticks(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Format the ticks of an axis with equal decimals, such as 0.10 and 0.05."""
    step, max_abs = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if max_abs < 0.01 or max_abs >= 1e6:
        return [(tick, format_compact(tick)) for tick in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits and abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return [(tick, f"{tick:,.{digits}f}") for tick in ticks]


def format_compact(value: float) -> str:
    """Format a number briefly, such as 1,200, 12k, 0.05 or 2e-4."""
    magnitude = abs(value)
    if magnitude and (magnitude < 0.01 or magnitude >= 1e9):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if magnitude >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.3g}{unit}"
    return f"{value:,.4g}" if magnitude < 1000 else f"{value:,.0f}"


def format_exact(value: float) -> str:
    """Format a number with four significant digits."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e7):
        return f"{value:.3e}"
    return f"{value:,.1f}" if magnitude >= 1000 else f"{value:.4g}"


def _summarize_chart(title: str, series: Sequence[ChartSeries]) -> str:
    """Describe a chart as text for screen readers: first and last value of each series."""
    descriptions = []
    for item in series:
        if item.style != "faint":
            (x1, y1), (x2, y2) = item.points[0], item.points[-1]
            values = item.name, format_exact(y1), f"{x1:g}", format_exact(y2), f"{x2:g}"
            descriptions.append(translate("{} {} at step {}, {} at step {}", *values))
    return translate("{}: {}", title, translate("; ").join(descriptions))


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
    bins = [int(name) for _, counts in nonempty for name in counts]
    low, high = min(bins), max(bins)
    percentages = []
    for name, counts in nonempty:
        total = sum(counts.values())
        values = [100 * counts.get(str(index), 0) / total for index in range(low, high + 1)]
        percentages.append((name, values))
    max_percentage = max(max(values) for _, values in percentages)
    y_tick_values = compute_ticks(0.0, max_percentage, 4, include_ends=True)
    edges = [math.ceil(2 ** (index / 2) - 1e-9) for index in range(low, high + 2)]
    label_interval = max(1, math.ceil(len(edges) / 7))
    scale = _AxisScale(0, len(edges) - 1, 0, y_tick_values[-1])
    return Chart(
        title=title,
        caption=caption,
        summary=_summarize_histogram(title, percentages, edges),
        lines=tuple(
            ChartLine(name, "line", scale.build_step_path(values), (), ())
            for name, values in percentages
        ),
        x_ticks=tuple(
            AxisTick(scale.to_x(index), f"{edge:,}")
            for index, edge in enumerate(edges)
            if index % label_interval == 0
        ),
        y_ticks=tuple(AxisTick(scale.to_y(value), f"{value:g} %") for value in y_tick_values),
        data=ChartData(
            x=[-0.5, len(edges) - 1.5],
            y=[0.0, y_tick_values[-1]],
            series=[
                SeriesData(
                    name=name,
                    points=[
                        (x, value, f"{format_exact(value)} %") for x, value in enumerate(values)
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


def _summarize_histogram(
    title: str, percentages: Sequence[tuple[str, Sequence[float]]], edges: list[int]
) -> str:
    descriptions = []
    for name, values in percentages:
        index = max(range(len(values)), key=values.__getitem__)
        low, high = edges[index], max(edges[index], edges[index + 1] - 1)
        descriptions.append(translate("{} mostly {:,} to {:,}", name, low, high))
    return translate("{}: {}", title, translate("; ").join(descriptions))


def build_run_charts(run_record: RunRecord) -> list[Chart]:
    """Build the charts of a run report, without charts that have no values.

    They show loss, primary metric, learning rate, gradient norm, throughput and MFU.
    """
    evaluations = run_record.evaluations
    points = {
        name: filter_finite((line.get("step"), line.get(name)) for line in run_record.steps)
        for name in ("loss", "grad_norm", "samples_per_s", "mfu")
    }
    validation_points = filter_finite(
        (line.get("step"), line.get("validation_loss")) for line in evaluations
    )
    mfu_percentages = [(step, 100 * mfu) for step, mfu in points["mfu"]]
    charts = [
        build_chart(
            translate("Loss"),
            [
                *_build_smoothed_series(translate("training"), points["loss"]),
                ChartSeries(translate("validation"), validation_points, "marks"),
            ],
            translate("nats per supervised token"),
        ),
        _build_primary_metric_chart(evaluations),
        build_chart(translate("Learning rate"), _build_lr_series(run_record.steps)),
        build_chart(
            translate("Gradient norm"),
            _build_smoothed_series(translate("norm"), points["grad_norm"]),
            translate("before clipping"),
        ),
        build_chart(
            translate("Throughput"),
            _build_smoothed_series(translate("samples/s"), points["samples_per_s"]),
            translate("samples/s"),
        ),
        build_chart(
            translate("MFU"),
            _build_smoothed_series(translate("MFU"), mfu_percentages),
            translate("% of the measured peak FLOPS"),
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _build_smoothed_series(name: str, points: Sequence[Point]) -> list[ChartSeries]:
    """Return a series and, if it has many points, its smoothed version."""
    smoothed = smooth_points(points)
    if not smoothed:
        return [ChartSeries(name, points)]
    return [ChartSeries(name, points, "faint"), ChartSeries(translate("smoothed"), smoothed)]


def _build_primary_metric_chart(evaluations: Sequence[JsonObject]) -> Chart | None:
    names = [line["primary_metric"] for line in evaluations if line.get("primary_metric")]
    if not names:
        return None
    name = str(names[-1])
    points, error_bars = [], []
    for line in evaluations:
        scores: Any = line.get("scores")
        points += filter_finite([(line.get("step"), scores.get(name) if scores else None)])
        interval = read_interval(line, name)
        if interval is not None:
            error_bars.append((float(line["step"]), *interval))
    note = translate("validation, bars: 95 % intervals" if error_bars else "validation")
    title = format_metric_name(name)
    return build_chart(title, [ChartSeries(title, points, "marks", error_bars)], note)


def _build_lr_series(steps: Sequence[JsonObject]) -> list[ChartSeries]:
    """Return the learning rate of each part of the model.

    Parts with equal learning rates share a line.
    """
    lr_by_step = [
        (line.get("step"), line["lr"]) for line in steps if isinstance(line.get("lr"), dict)
    ]
    parts_by_line: dict[tuple[Point, ...], list[str]] = {}
    for part in dict.fromkeys(part for _, lr_by_part in lr_by_step for part in lr_by_part):
        points = filter_finite((step, lr_by_part.get(part)) for step, lr_by_part in lr_by_step)
        parts_by_line.setdefault(tuple(points), []).append(part)
    return [ChartSeries(", ".join(parts), points) for points, parts in parts_by_line.items()]
