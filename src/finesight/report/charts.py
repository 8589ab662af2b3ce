"""Line charts for HTML pages: axis scales, ticks and downsampled lines in SVG coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from finesight.report.i18n import translate
from finesight.report.run_reader import is_finite

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
        name: Name in the legend.
        points: Pairs of step and value.
        style: `line`, `faint` (a line behind its smoothed series), or `marks` (a line with
            markers).
        error_bars: Triples of step, low and high.
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "marks"] = "line"
    error_bars: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class AxisTick:
    """Tick of a chart axis.

    Attributes:
        offset: Coordinate in SVG units.
        label: Formatted value.
    """

    offset: float
    label: str


@dataclass(frozen=True)
class ChartLine:
    """Drawn line of a chart, in SVG coordinates.

    Attributes:
        name: Name of the series.
        style: Style of the series.
        path: SVG path of the line.
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
        x: Low and high end of the x axis.
        y: Low and high end of the y axis.
        series: Points of each line.
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
        extremes = {min(bucket, key=_get_value), max(bucket, key=_get_value)}
        downsampled += sorted(extremes)
    return downsampled


def _get_value(point: Point) -> float:
    return point[1]


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
        low: Lower end of the axis.
        high: Upper end of the axis.
        num_ticks: Approximate number of ticks.
        integer_only: Use integer distances between ticks.
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
