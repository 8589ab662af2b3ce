"""Charts for HTML pages in SVG coordinates: lines by step, and histograms.

A page draws axis ticks and downsampled lines. Its script shows values under the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import mean
from typing import Any, Literal

from finesight.metric_components import PAIR_METRICS
from finesight.report.histogram_counts import HistogramCounts
from finesight.report.i18n import translate
from finesight.report.metric_rows import (
    IntervalBounds,
    format_metric_name,
    read_interval,
    read_metrics,
)
from finesight.report.run_reader import (
    JsonObject,
    RunRecord,
    get_sample_set,
    is_finite,
    list_comparable_evaluations,
)
from finesight.report.summary import estimate_reward, list_reward_names

Point = tuple[float, float]

REWARD_CURVES = (
    ("Reward", "weighted sum of all rewards", "reward"),
    ("Completion length", "tokens per response", "completions/mean_length"),
    ("Truncated responses", "share of the responses of a step", "completions/clipped_ratio"),
    ("Groups with equal rewards", "share of the groups of a step", "frac_reward_zero_std"),
    ("Sampler and trainer", "log-probability difference", "sampling/sampling_logp_difference/mean"),
    ("Entropy", "nats per token", "entropy"),
)
"""Title, caption and metric of the charts of a run with rewards."""

NUM_REWARD_ESTIMATES = 20
"""Maximum number of estimates with intervals of a reward chart."""

MAX_POINTS = 1000
"""Maximum number of points of a line. A screen cannot show more."""

NUM_SPARKLINE_POINTS = 60
"""Maximum number of points of a line without axes."""

MAX_STEP = 1e15
"""Maximum of a drawn step. Only a damaged file has larger ones, whose neighbors are not floats."""

MAX_MAGNITUDE = 1e100
"""Maximum magnitude of a drawn value. Only a damaged file has larger ones, whose range overflows.

Values below its reciprocal are drawn as 0.
"""

# Size and margins of a chart in SVG units, which are about one phone pixel.
WIDTH = 400.0
HEIGHT = 220.0
MARGIN_LEFT = 46.0
MARGIN_RIGHT = 10.0
MARGIN_TOP = 10.0
MARGIN_BOTTOM = 24.0


@dataclass(frozen=True)
class ChartSeries:
    """Input of a chart: one series of values by step.

    Attributes:
        style: `line`, `faint` (a line behind its smoothed series), `points` (markers without a
            line, because nothing was measured between them), `marks` (a line with markers), or
            `steps` (a histogram whose bins are centered at the points).
        error_bars: Step, low and high of each error bar.
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "points", "marks", "steps"] = "line"
    error_bars: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class ChartLine:
    """Drawn line of a chart, in SVG coordinates.

    Attributes:
        path: Path of the line; empty for points.
        markers: Coordinates (x, y) of the markers.
        error_bars: Coordinates (x, y of high, y of low) of the error bars.
    """

    name: str
    style: str
    path: str
    markers: tuple[Point, ...] = ()
    error_bars: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Chart for a page template, with all coordinates computed.

    Attributes:
        x_ticks: Coordinate and label of each tick of the axis; `y_ticks` likewise.
        data: Data for the script of the page: the ends of the axes `x` and `y`, and `series` with
            `name` and `points` (x, y, formatted y). Histograms have `labels` of x = 0, 1, 2, ...
    """

    title: str
    caption: str
    summary: str
    lines: list[ChartLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    data: dict[str, Any]


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

    def build_line(self, series: ChartSeries) -> ChartLine:
        error_bars = []
        for x, low, high in series.error_bars:
            error_bars.append((self.to_x(x), self.to_y(high), self.to_y(low)))
        if series.style == "steps":
            path = self._build_histogram_path(series.points)
            return ChartLine(series.name, series.style, path, error_bars=tuple(error_bars))
        coordinates = tuple((self.to_x(x), self.to_y(y)) for x, y in series.points)
        path = ""
        if series.style != "points":
            path = "M" + "L".join(f"{x:g} {y:g}" for x, y in coordinates)
        markers: tuple[Point, ...] = ()
        # A line with one point is invisible without a marker.
        if series.style in ("points", "marks") or len(coordinates) == 1:
            markers = coordinates
        return ChartLine(series.name, series.style, path, markers, tuple(error_bars))

    def _build_histogram_path(self, points: Sequence[Point]) -> str:
        """Return the path of a histogram whose bins are centered at the points."""
        bottom = f"{self.to_y(0):g}"
        segments = [f"M{self.to_x(-0.5):g} {bottom}"]
        for x, y in points:
            segments.append(f"V{self.to_y(y):g}H{self.to_x(x + 0.5):g}")
        segments.append(f"V{bottom}")
        return "".join(segments)

    def draw(
        self,
        titles: tuple[str, str],
        series: Sequence[ChartSeries],
        descriptions: Sequence[str],
        ticks: tuple[Sequence[tuple[float, str]], Sequence[tuple[float, str]]],
        unit: str = "",
        **data: object,
    ) -> Chart:
        """Return the chart of series, with title and caption, and ticks of both axes."""
        title, caption = titles
        x_ticks, y_ticks = ticks
        shown = []
        for one in series:
            points = [(x, y, f"{format_exact(y)}{unit}") for x, y in one.points]
            shown.append({"name": one.name, "points": points})
        axes = {"x": [self.x_low, self.x_high], "y": [self.y_low, self.y_high]}
        return Chart(
            title=title,
            caption=caption,
            summary=translate("{}: {}", title, translate("; ").join(descriptions)),
            lines=list(map(self.build_line, series)),
            x_ticks=[(self.to_x(x), label) for x, label in x_ticks],
            y_ticks=[(self.to_y(y), label) for y, label in y_ticks],
            data=axes | {"series": shown} | data,
        )


def build_chart(title: str, series: Sequence[ChartSeries], caption: str = "") -> Chart | None:
    """Build a chart from all series that have points within the limits of a chart.

    Returns None if no series has points.
    """
    visible = [item for item in map(_drop_extreme_values, series) if item.points]
    if not visible:
        return None
    drawn = []
    descriptions = []
    steps: list[float] = []
    values: list[float] = []
    for item in visible:
        points = downsample(item.points)
        drawn.append(replace(item, points=points))
        if item.style != "faint":
            descriptions.append(_describe_ends(item))
        steps += map(itemgetter(0), item.points)
        values += map(itemgetter(1), points)
        for _, low, high in item.error_bars:
            values += [low, high]
    x_low = min(steps)
    x_high = max(steps)
    # `compute_ticks` would widen so small a range beyond the chart.
    if x_high - x_low <= 1e-6 * max(1.0, abs(x_low), abs(x_high)):
        x_ticks = [steps[0]]
        x_low -= 1
        x_high += 1
    else:
        x_ticks = compute_ticks(x_low, x_high, 6, integer_only=True)
    y_ticks = compute_ticks(min(values), max(values), 5, include_ends=True)
    ticks = _label_ticks(x_ticks, format_compact), _format_ticks(y_ticks)
    scale = _AxisScale(x_low, x_high, y_ticks[0], y_ticks[-1])
    return scale.draw((title, caption), drawn, descriptions, ticks)


def _drop_extreme_values(series: ChartSeries) -> ChartSeries:
    """Remove the points and error bars that exceed the limits of a chart."""
    points = []
    for step, value in series.points:
        if abs(step) <= MAX_STEP and abs(value) <= MAX_MAGNITUDE:
            points.append((step, value))
    error_bars = []
    for step, low, high in series.error_bars:
        if abs(step) <= MAX_STEP and max(abs(low), abs(high)) <= MAX_MAGNITUDE:
            error_bars.append((step, low, high))
    return replace(series, points=points, error_bars=error_bars)


def _describe_ends(series: ChartSeries) -> str:
    """Describe the first and the last point of a series."""
    first_step, first = series.points[0]
    last_step, last = series.points[-1]
    return translate(
        "{} {} at step {}, {} at step {}",
        series.name,
        format_exact(first),
        f"{first_step:g}",
        format_exact(last),
        f"{last_step:g}",
    )


def build_parallel_plot(
    title: str, caption: str, axes: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> Chart:
    """Build a plot with one axis per setting or score, and one line per trial.

    Args:
        axes: Values of the trials by the name of the axis. An axis has the positions of the sorted
            values, or of their order if they are no numbers.
        names: Names of the trials.
    """
    trials: list[list[tuple[float, float, str]]] = [[] for _ in names]
    for x, values in enumerate(axes.values()):
        order = list(dict.fromkeys(values))
        if all(isinstance(value, int | float) for value in values):
            order = sorted(set(values))
        for trial, value in zip(trials, values, strict=True):
            y = order.index(value) / max(1, len(order) - 1)
            trial.append((x, y, str(value)))
    series = []
    for name, trial in zip(names, trials, strict=True):
        points = [(x, y) for x, y, _ in trial]
        series.append(ChartSeries(name, points, "marks"))
    chart = build_chart(title, series, caption)
    assert chart is not None, "a plot without trials"
    for one, trial in zip(chart.data["series"], trials, strict=True):
        # The script shows the value of a setting instead of its position on the axis.
        one["points"] = trial
    low, high = chart.data["x"]
    scale = _AxisScale(low, high, 0.0, 1.0)
    ticks = []
    for x, name in enumerate(axes):
        label = name.removesuffix(".default").rpartition(".")[2]
        ticks.append((scale.to_x(x), label))
    data = chart.data | {"labels": list(axes)}
    return replace(chart, x_ticks=ticks, y_ticks=[], data=data)


def filter_finite(points: Iterable[tuple[object, object]]) -> list[Point]:
    """Return the points whose step and value are finite numbers.

    Steps with a non-finite loss record no value, and files of a run may contain invalid values.
    """
    return [(float(x), float(y)) for x, y in points if is_finite(x) and is_finite(y)]


def read_points(lines: Iterable[JsonObject], key: str) -> list[Point]:
    """Return steps and finite values of a key in the lines of a run."""
    return filter_finite((line.get("step"), line.get(key)) for line in lines)


def read_metric_points(evaluations: Iterable[JsonObject], name: str) -> list[Point]:
    """Return the steps and the finite values of a metric in evaluations."""
    return filter_finite((line.get("step"), read_metrics(line).get(name)) for line in evaluations)


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
    total = 0.0
    weight = 0.0
    smoothed = []
    for step, value in points:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append((step, total / weight))
    return smoothed


def build_sparkline(steps: Sequence[JsonObject]) -> str:
    """Return the points of an SVG polyline of the training loss, in a box of 100 x 30.

    The result is empty for fewer than two steps.
    """
    points = read_points(steps, "loss")
    points = downsample(smooth_points(points) or points, NUM_SPARKLINE_POINTS)
    if len(points) < 2:
        return ""
    first = points[0][0]
    num_steps = points[-1][0] - first or 1.0
    losses = list(map(itemgetter(1), points))
    low = min(losses)
    span = max(losses) - low or 1.0
    corners = []
    for step, loss in points:
        x = 100 * (step - first) / num_steps
        y = 30 * (1 - (loss - low) / span)
        corners.append(f"{x:.1f},{y:.1f}")
    return " ".join(corners)


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
    max_abs = max(abs(low), abs(high))
    if max_abs < 1 / MAX_MAGNITUDE:
        low = -1.0
        high = 1.0
    elif high - low <= 1e-6 * max_abs:
        margin = abs(low) / 2
        high = low + margin
        low -= margin
    min_step = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= min_step * 0.999
    )
    if integer_only:
        step = max(1.0, round(step))
    if include_ends:
        first = math.floor(low / step)
        last = math.ceil(high / step)
    else:
        first = math.ceil(low / step)
        last = math.floor(high / step)
    return [multiple * step for multiple in range(first, last + 1)]


def _label_ticks(
    ticks: Sequence[float], format_tick: Callable[[float], str]
) -> list[tuple[float, str]]:
    return [(tick, format_tick(tick)) for tick in ticks]


def _format_ticks(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Format the ticks of an axis with equal decimals, such as 0.10 and 0.05."""
    step = ticks[1] - ticks[0]
    max_abs = max(map(abs, ticks))
    if max_abs < 0.01 or max_abs >= 1e6:
        return _label_ticks(ticks, format_compact)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits and abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return _label_ticks(ticks, f"{{:,.{digits}f}}".format)


def format_compact(value: float) -> str:
    """Format a number briefly, such as 1,200, 12k, 0.05 or 2e-4."""
    magnitude = abs(value)
    if magnitude and (magnitude < 0.01 or magnitude >= 1e9):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if magnitude >= 1e6:
        return f"{value / 1e6:.3g}M"
    if magnitude >= 1e4:
        return f"{value / 1e3:.3g}k"
    if magnitude < 1000:
        return f"{value:,.4g}"
    return f"{value:,.0f}"


def format_exact(value: float) -> str:
    """Format a number with four significant digits."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e7):
        return f"{value:.3e}"
    if magnitude >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4g}"


def parse_counts(content: object) -> HistogramCounts:
    """Return the valid bins of a histogram that a run has recorded."""
    if not isinstance(content, dict):
        return {}
    bins = set(map(str, range(120)))
    counts = {}
    for name, count in content.items():
        if name in bins and isinstance(count, int) and count > 0:
            counts[name] = count
    return counts


_EMPTY_BIN = "1"
"""Bin from 2 ** 0.5 to 2, which contains no integer. Only a damaged file has values in it."""


def build_histogram(
    title: str, caption: str, counts_by_run: Sequence[tuple[str, HistogramCounts]]
) -> Chart | None:
    """Build a chart of histograms in percent, with one step line per run.

    Runs without values are omitted. Returns None if no run has values.
    """
    bins: list[int] = []
    drawn: list[tuple[str, HistogramCounts]] = []
    for name, recorded in counts_by_run:
        visible = {index: count for index, count in recorded.items() if index != _EMPTY_BIN}
        if visible:
            drawn.append((name, visible))
            bins += map(int, visible)
    if not bins:
        return None
    bin_range = [index for index in range(min(bins), max(bins) + 1) if str(index) != _EMPTY_BIN]
    edges = [math.ceil(2 ** (index / 2) - 1e-9) for index in (*bin_range, bin_range[-1] + 1)]
    labels = list(map(_label_bin, edges, edges[1:]))
    series = []
    descriptions = []
    highest = 0.0
    for name, counts in drawn:
        total = sum(counts.values())
        values = [100 * counts.get(str(index), 0) / total for index in bin_range]
        mode = max(values)
        highest = max(highest, mode)
        series.append(ChartSeries(name, list(enumerate(values)), "steps"))
        descriptions.append(translate("{} mostly {}", name, labels[values.index(mode)]))
    x_ticks = []
    for index in range(0, len(edges), max(1, math.ceil(len(edges) / 7))):
        x_ticks.append((index - 0.5, f"{edges[index]:,}"))
    y_ticks = compute_ticks(0.0, highest, 4, include_ends=True)
    ticks = x_ticks, _label_ticks(y_ticks, "{:g} %".format)
    scale = _AxisScale(-0.5, len(edges) - 1.5, 0.0, y_ticks[-1])
    return scale.draw((title, caption), series, descriptions, ticks, " %", labels=labels)


def _label_bin(lower: int, end: int) -> str:
    """Return the translated label of a bin of the integers from `lower` to below `end`."""
    if end - 1 > lower:
        return translate("{:,} to {:,}", lower, end - 1)
    return f"{lower:,}"


def build_histograms(
    titles: Mapping[str, tuple[str, str]],
    counts_by_run: Sequence[tuple[str, Mapping[str, HistogramCounts]]],
) -> list[Chart]:
    """Build the charts of several histograms by name, without those that no run has.

    Args:
        titles: Title and caption of each histogram, not translated.
        counts_by_run: Display name of each run, and its histograms.
    """
    charts = []
    for name, (title, caption) in titles.items():
        counts = [(run, one.get(name, {})) for run, one in counts_by_run]
        chart = build_histogram(translate(title), translate(caption), counts)
        if chart is not None:
            charts.append(chart)
    return charts


def build_run_charts(run_record: RunRecord) -> list[Chart]:
    """Build the charts of a run report, without charts that have no values.

    They show rewards, loss, primary metric, accuracy and margin of preference pairs, learning rate,
    gradient norm, throughput and MFU.
    """
    evaluations = list_comparable_evaluations(run_record.evaluations)
    subset_text = _describe_subset(run_record.evaluations, evaluations, "num_loss_samples")

    def read_series(title: str, key: str, factor: float = 1.0) -> list[ChartSeries]:
        """Return a value of all steps and, if there are many, a smoothed series."""
        points = [(step, factor * value) for step, value in read_points(run_record.steps, key)]
        smoothed = smooth_points(points)
        if not smoothed:
            return [ChartSeries(title, points)]
        return [ChartSeries(title, points, "faint"), ChartSeries(translate("smoothed"), smoothed)]

    def build_split_chart(title: str, key: str, eval_key: str, note: str = "") -> Chart | None:
        """Build a chart of a value of all steps and of all evaluations."""
        points = read_metric_points(evaluations, eval_key)
        series = read_series(translate("training"), key)
        validation = ChartSeries(translate("validation"), points, "points")
        return build_chart(title, [*series, validation], note + subset_text)

    loss_text = translate("nats per supervised token")
    if run_record.steps and not run_record.steps[0].keys().isdisjoint(PAIR_METRICS):
        loss_text = translate("mean over pairs")
    charts: list[Chart | None] = []
    names = list_reward_names(run_record.steps)
    for name in names:
        charts.append(_build_reward_chart(run_record, name))
    if names:
        for title, text, key in REWARD_CURVES:
            series = read_series(translate("steps"), key)
            charts.append(build_chart(translate(title), series, translate(text)))
        # A policy is not trained on the cross entropy of the reference answers.
        policy_text = translate("of the policy")
        charts.append(build_split_chart(translate("Loss"), "loss", "", policy_text))
        title = translate("Validation loss")
        charts.append(build_split_chart(title, "", "validation_loss", loss_text))
    else:
        charts.append(build_split_chart(translate("Loss"), "loss", "validation_loss", loss_text))
    for key in PAIR_METRICS:
        charts.append(build_split_chart(format_metric_name(key), key, key))
    charts.append(_build_primary_metric_chart(run_record))
    charts.append(build_chart(translate("Learning rate"), _build_lr_series(run_record)))
    norm = read_series(translate("norm"), "grad_norm")
    charts.append(build_chart(translate("Gradient norm"), norm, translate("before clipping")))
    samples_text = translate("samples/s")
    throughput = read_series(samples_text, "samples_per_s")
    charts.append(build_chart(translate("Throughput"), throughput, samples_text))
    mfu = read_series(translate("MFU"), "mfu", 100)
    title = translate("MFU (model FLOPs utilization)")
    charts.append(build_chart(title, mfu, translate("% of the measured peak FLOPS")))
    return [chart for chart in charts if chart is not None]


def _build_reward_chart(run_record: RunRecord, name: str) -> Chart | None:
    """Build the chart of a reward: its mean in each step, and estimates for several steps."""
    steps = run_record.steps
    size = math.ceil(len(steps) / NUM_REWARD_ESTIMATES)
    rows = []
    for start in range(0, len(steps), size):
        lines = steps[start : start + size]
        center = mean(float(line["step"]) for line in lines)
        estimate, margin = estimate_reward(run_record, lines, name)
        rows.append((center, estimate, (estimate - margin, estimate + margin)))
    points = read_points(steps, f"rewards/{name}/mean")
    every_step = ChartSeries(translate("steps"), points, "faint")
    estimates = _build_estimates(translate("mean of {:,} steps", size), rows)
    title = translate("Reward: {}", format_metric_name(name))
    return build_chart(title, [every_step, estimates], translate("bars: 95 % intervals"))


def _build_primary_metric_chart(run_record: RunRecord) -> Chart | None:
    name = run_record.primary_metric
    if name is None:
        return None
    evaluations = list_comparable_evaluations(run_record.evaluations, "num_samples")
    rows = []
    for line in evaluations:
        value = read_metrics(line).get(name)
        rows.append((line.get("step"), value, read_interval(line, name)))
    title = format_metric_name(name)
    series = _build_estimates(title, rows)
    note = translate("validation, bars: 95 % intervals" if series.error_bars else "validation")
    note += _describe_subset(run_record.evaluations, evaluations, "num_samples")
    return build_chart(title, [series], note)


def _build_estimates(
    name: str, rows: Sequence[tuple[Any, float | None, IntervalBounds | None]]
) -> ChartSeries:
    """Build a series of values with error bars from rows of step, value and interval."""
    points = []
    bars = []
    for step, value, interval in rows:
        points.append((step, value))
        if interval and is_finite(value):
            low, high = interval
            bars.append((float(step), low, high))
    return ChartSeries(name, filter_finite(points), "points", bars)


def _describe_subset(
    all_lines: Sequence[JsonObject], evaluations: Sequence[JsonObject], count: str
) -> str:
    """Describe the validation samples of a curve, if they are not all samples; otherwise empty."""
    num_samples: object = None
    if evaluations:
        _, num_samples = get_sample_set(evaluations[-1], count)
    has_others = len(evaluations) < len(all_lines) or any(line.get("full") for line in all_lines)
    if not has_others or not isinstance(num_samples, int):
        return ""
    return translate("; validation on the same {:,} samples", num_samples)


def _build_lr_series(run_record: RunRecord) -> list[ChartSeries]:
    """Return the learning rate of each part of the model. Parts with equal values share a line."""
    lr_by_step: list[tuple[object, JsonObject]] = []
    parts: dict[str, None] = {}
    for line in run_record.steps:
        lr_by_part = line.get("lr")
        if isinstance(lr_by_part, dict):
            lr_by_step.append((line.get("step"), lr_by_part))
            parts.update(dict.fromkeys(lr_by_part))
    parts_by_line: dict[tuple[Point, ...], list[str]] = {}
    for part in parts:
        points = filter_finite((step, lr_by_part.get(part)) for step, lr_by_part in lr_by_step)
        parts_by_line.setdefault(tuple(points), []).append(part)
    series = []
    for line_points, names in parts_by_line.items():
        series.append(ChartSeries(", ".join(names), line_points))
    return series
