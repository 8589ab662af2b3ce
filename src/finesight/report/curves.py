"""Curves of a run as drawings: scales with round ticks, lines thinned, everything ready for SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from finesight.report.language import say
from finesight.report.record import is_finite

Point = tuple[float, float]
"""(step, value)."""

MOST_POINTS = 1000
"""Points of a line, at most: more cannot be told apart on any screen."""

WIDTH, HEIGHT = 400.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0
"""The drawing and its margins, in units that are about a pixel on a phone."""


@dataclass(frozen=True)
class Series:
    """One quantity over the steps. `whiskers` are (step, low, high)."""

    name: str
    points: Sequence[Point]
    look: Literal["line", "faint", "marks"] = "line"
    whiskers: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Tick:
    """A value on an axis: where it lies in the drawing, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series in the drawing: an SVG path, marks (x, y), whiskers (x, y of high, y of low)."""

    name: str
    look: str
    path: str
    marks: tuple[Point, ...]
    whiskers: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Drawing:
    """A chart whose places are all known."""

    title: str
    note: str
    summary: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    data: ChartData


class ChartData(TypedDict):
    """What the page's script needs to read values off a chart: the ends of both axes, and the
    points of every series. `labels` say what stands at 0, 1, 2... across, where that is no step."""

    x: list[float]
    y: list[float]
    series: list[SeriesData]
    labels: NotRequired[list[str]]


class SeriesData(TypedDict):
    """A series by name; its values as they are written stand beside the points."""

    name: str
    points: list[tuple[float, float, str]]


def draw(title: str, series: Sequence[Series], note: str = "") -> Drawing | None:
    """A chart of the series that hold a point; None when none does."""
    shown = [one for one in series if one.points]
    if not shown:
        return None
    thinned = [thin(one.points) for one in shown]
    steps = [step for one in shown for step, _ in one.points]
    values = [value for points in thinned for _, value in points]
    values += [end for one in shown for _, *ends in one.whiskers for end in ends]
    x_low, x_high = min(steps), max(steps)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    up = round_ticks(min(values), max(values), 5, beyond=True)
    across = round_ticks(x_low, x_high, 6, whole=True)
    scale = _Scale(x_low, x_high, up[0], up[-1])
    return Drawing(
        title=title,
        note=note,
        summary=_summary(title, shown),
        lines=tuple(scale.line(one, points) for one, points in zip(shown, thinned, strict=True)),
        across=tuple(Tick(scale.x(value), compact(value)) for value in across),
        up=tuple(Tick(scale.y(value), label) for value, label in _labelled(up)),
        data=ChartData(
            x=[x_low, x_high],
            y=[up[0], up[-1]],
            series=[
                SeriesData(name=one.name, points=[(x, y, exact(y)) for x, y in points])
                for one, points in zip(shown, thinned, strict=True)
            ],
        ),
    )


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, series: Series, points: Sequence[Point]) -> Line:
        places = [(self.x(x), self.y(y)) for x, y in points]
        return Line(
            name=series.name,
            look=series.look,
            path="M" + "L".join(f"{x:g} {y:g}" for x, y in places),
            # A line of one point would not be seen.
            marks=tuple(places) if series.look == "marks" or len(places) == 1 else (),
            whiskers=tuple(
                (self.x(x), self.y(high), self.y(low)) for x, low, high in series.whiskers
            ),
        )


def finite(points: Iterable[tuple[object, object]]) -> list[Point]:
    """The points whose step and value are finite numbers: a step that an overflow made void has
    no loss, and a file may hold anything."""
    return [(float(x), float(y)) for x, y in points if is_finite(x) and is_finite(y)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: of each run of neighbours the lowest and the highest, in order, so
    that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept = []
    buckets = most // 2
    for number in range(buckets):
        start = number * len(points) // buckets
        bucket = points[start : (number + 1) * len(points) // buckets]
        ends = {min(bucket, key=_value), max(bucket, key=_value)}
        kept += sorted(ends)
    return kept


def _value(point: Point) -> float:
    return point[1]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean that forgets exponentially, over about a fortieth of the points, corrected
    for its start (as Adam's are: Kingma & Ba 2015, section 3). Empty for fewer than 20 points."""
    if len(points) < 20:
        return []
    keep = 1 - 1 / max(5.0, len(points) / 40)
    total, weight, mean = 0.0, 0.0, []
    for step, value in points:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        mean.append((step, total / weight))
    return mean


def round_ticks(
    low: float, high: float, about: int, *, whole: bool = False, beyond: bool = False
) -> list[float]:
    """Round numbers between `low` and `high`, about so many; `beyond` takes in the next round
    ones outside, so that they can be the ends of an axis."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (-1.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step) if beyond else math.ceil(low / step)
    last = math.ceil(high / step) if beyond else math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """All labels of an axis in the same manner: 0.10 beside 0.05, 2e-4 beside 1e-4."""
    step, most = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if most < 0.01 or most >= 1e6:
        return [(tick, compact(tick)) for tick in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits and abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return [(tick, f"{tick:,.{digits}f}") for tick in ticks]


def compact(value: float) -> str:
    """A number in few characters: 1,200 and 12k, 0.05 and 2e-4."""
    size = abs(value)
    if size and (size < 0.01 or size >= 1e9):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.3g}{unit}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def exact(value: float) -> str:
    """A number to four digits that matter."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.3e}"
    return f"{value:,.1f}" if size >= 1000 else f"{value:.4g}"


def _summary(title: str, series: Sequence[Series]) -> str:
    """The chart in words, for who cannot see it."""
    pieces = []
    for one in series:
        if one.look != "faint":
            (x1, y1), (x2, y2) = one.points[0], one.points[-1]
            ends = one.name, exact(y1), f"{x1:g}", exact(y2), f"{x2:g}"
            pieces.append(say("{} {} at step {}, {} at step {}", *ends))
    return say("{}: {}", title, say("; ").join(pieces))
