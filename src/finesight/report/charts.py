"""Charts for HTML pages in SVG coordinates: lines by step, and histograms.

A page draws axis ticks and downsampled lines. Its script shows values under the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from statistics import mean
from typing import Any, Literal

from finesight.check.check_issues import HistogramCounts
from finesight.evaluate.task_metrics import PAIR_METRICS
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
"""Title, caption and metric of the charts of a GRPO run."""

NUM_REWARD_ESTIMATES = 20
"""Maximum number of estimates with intervals of a reward chart."""

MAX_POINTS = 1000
"""Maximum number of points of a line. A screen cannot show more."""

WIDTH, HEIGHT = 400.0, 220.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 10.0, 10.0, 24.0
"""Size and margins of a chart in SVG units, which are about one phone pixel."""


@dataclass(frozen=True)
class ChartSeries:
    """Input of a chart: one series of values by step.

    Attributes:
        style: `line`, `faint` (a line behind its smoothed series), `marks` (a line with markers),
            or `steps` (a histogram whose bins are centered at the points).
        error_bars: Step, low and high of each error bar.
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "marks", "steps"] = "line"
    error_bars: Sequence[tuple[float, float, float]] = ()


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
        coordinates = [(self.to_x(x), self.to_y(y)) for x, y in series.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in coordinates)
        # A line with one point is invisible without a marker.
        has_markers = series.style == "marks" or len(coordinates) == 1
        if series.style == "steps":
            segments = [f"V{self.to_y(y):g}H{self.to_x(x + 0.5):g}" for x, y in series.points]
            bottom, has_markers = f"{self.to_y(0):g}", False
            path = f"M{self.to_x(-0.5):g} {bottom}{''.join(segments)}V{bottom}"
        error_bars = (
            (self.to_x(x), self.to_y(high), self.to_y(low)) for x, low, high in series.error_bars
        )
        markers = tuple(coordinates) if has_markers else ()
        return ChartLine(series.name, series.style, path, markers, tuple(error_bars))

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
        x_ticks, y_ticks = ticks
        lines = [
            {
                "name": one.name,
                "points": [(x, y, f"{format_exact(y)}{unit}") for x, y in one.points],
            }
            for one in series
        ]
        axes = {"x": [self.x_low, self.x_high], "y": [self.y_low, self.y_high]}
        return Chart(
            *titles,
            translate("{}: {}", titles[0], translate("; ").join(descriptions)),
            [self.build_line(one) for one in series],
            [(self.to_x(x), label) for x, label in x_ticks],
            [(self.to_y(y), label) for y, label in y_ticks],
            axes | {"series": lines} | data,
        )


def build_chart(title: str, series: Sequence[ChartSeries], caption: str = "") -> Chart | None:
    """Build a chart from all series that have points.

    Returns None if no series has points.
    """
    visible = [item for item in series if item.points]
    if not visible:
        return None
    drawn = [replace(item, points=downsample(item.points)) for item in visible]
    steps = [step for item in visible for step, _ in item.points]
    values = [value for item in drawn for _, value in item.points]
    values += [bound for item in drawn for _, *bounds in item.error_bars for bound in bounds]
    x_low, x_high = min(steps), max(steps)
    x_ticks = [steps[0]]
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    else:
        x_ticks = compute_ticks(x_low, x_high, 6, integer_only=True)
    y_ticks = compute_ticks(min(values), max(values), 5, include_ends=True)
    descriptions = []
    for item in visible:
        if item.style != "faint":
            (x1, y1), (x2, y2) = item.points[0], item.points[-1]
            texts = item.name, format_exact(y1), f"{x1:g}", format_exact(y2), f"{x2:g}"
            descriptions.append(translate("{} {} at step {}, {} at step {}", *texts))
    ticks = [(tick, format_compact(tick)) for tick in x_ticks], _format_ticks(y_ticks)
    scale = _AxisScale(x_low, x_high, y_ticks[0], y_ticks[-1])
    return scale.draw((title, caption), drawn, descriptions, ticks)


def build_parallel_plot(
    title: str, caption: str, axes: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> Chart:
    """Build a plot with one axis per setting or score, and one line per trial.

    Args:
        axes: Values of the trials by the name of the axis. An axis has the positions of the sorted
            values, or of their order if they are no numbers.
        names: Names of the trials.
    """
    lines: list[list[Point]] = [[] for _ in names]
    for x, values in enumerate(axes.values()):
        is_numeric = all(isinstance(value, int | float) for value in values)
        order = sorted(set(values)) if is_numeric else [*dict.fromkeys(values)]
        for points, value in zip(lines, values, strict=True):
            points.append((x, order.index(value) / max(1, len(order) - 1)))
    series = [ChartSeries(*one, "marks") for one in zip(names, lines, strict=True)]
    chart = build_chart(title, series, caption)
    assert chart is not None, "a plot without trials"
    texts = [[str(values[i]) for values in axes.values()] for i in range(len(names))]
    for one, shown in zip(chart.data["series"], texts, strict=True):
        one["points"] = [(x, y, text) for (x, y, _), text in zip(one["points"], shown, strict=True)]
    labels = [name.removesuffix(".default").rpartition(".")[2] for name in axes]
    low, high = chart.data["x"]
    scale = _AxisScale(low, high, 0.0, 1.0)
    ticks = [(scale.to_x(x), label) for x, label in enumerate(labels)]
    data = chart.data | {"labels": [*axes]}
    return replace(chart, x_ticks=ticks, y_ticks=[], data=data)


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
    if magnitude >= 1e4:
        return f"{value / 1e6:.3g}M" if magnitude >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:,.4g}" if magnitude < 1000 else f"{value:,.0f}"


def format_exact(value: float) -> str:
    """Format a number with four significant digits."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e7):
        return f"{value:.3e}"
    return f"{value:,.1f}" if magnitude >= 1000 else f"{value:.4g}"


def parse_counts(content: object) -> HistogramCounts:
    """Return the valid bins of a histogram that a run has recorded."""
    bins = {str(index) for index in range(120)}
    return {
        name: count
        for name, count in (content.items() if isinstance(content, dict) else ())
        if name in bins and isinstance(count, int) and count > 0
    }


def build_histogram(
    title: str, caption: str, counts_by_run: Sequence[tuple[str, HistogramCounts]]
) -> Chart | None:
    """Build a chart of histograms in percent, with one step line per run.

    Runs without values are omitted. Returns None if no run has values.
    """
    bins = [int(name) for _, counts in counts_by_run for name in counts]
    if not bins:
        return None
    # The bin from 2 ** 0.5 to 2 contains no integer.
    bin_range = [index for index in range(min(bins), max(bins) + 1) if index != 1]
    edges = [math.ceil(2 ** (index / 2) - 1e-9) for index in (*bin_range, bin_range[-1] + 1)]
    labels = [
        translate("{:,} to {:,}", lower, upper - 1) if upper - 1 > lower else f"{lower:,}"
        for lower, upper in pairwise(edges)
    ]
    series, descriptions = [], []
    for name, counts in counts_by_run:
        if counts:
            total = sum(counts.values())
            values = [100 * counts.get(str(index), 0) / total for index in bin_range]
            series.append(ChartSeries(name, list(enumerate(values)), "steps"))
            descriptions.append(translate("{} mostly {}", name, labels[values.index(max(values))]))
    highest = max(value for one in series for _, value in one.points)
    y_ticks = compute_ticks(0.0, highest, 4, include_ends=True)
    x_ticks = range(0, len(edges), max(1, math.ceil(len(edges) / 7)))
    ticks = (
        [(index - 0.5, f"{edges[index]:,}") for index in x_ticks],
        [(tick, f"{tick:g} %") for tick in y_ticks],
    )
    scale = _AxisScale(-0.5, len(edges) - 1.5, 0.0, y_ticks[-1])
    return scale.draw((title, caption), series, descriptions, ticks, " %", labels=labels)


def build_histograms(
    titles: Mapping[str, tuple[str, str]],
    counts_by_run: Sequence[tuple[str, Mapping[str, HistogramCounts]]],
) -> list[Chart]:
    """Build the charts of several histograms by name, without those that no run has.

    Args:
        titles: Title and caption of each histogram, not translated.
        counts_by_run: Display name of each run, and its histograms.
    """
    counts = {name: [(run, one.get(name, {})) for run, one in counts_by_run] for name in titles}
    charts = [
        build_histogram(translate(title), translate(caption), counts[name])
        for name, (title, caption) in titles.items()
    ]
    return [chart for chart in charts if chart is not None]


def build_run_charts(run_record: RunRecord) -> list[Chart]:
    """Build the charts of a run report, without charts that have no values.

    They show rewards, loss, primary metric, accuracy and margin of preference pairs, learning rate,
    gradient norm, throughput and MFU.
    """

    def read_series(title: str, key: str, factor: float = 1.0) -> list[ChartSeries]:
        """Return a value of all steps and, if there are many, a smoothed series."""
        lines = run_record.steps
        points = [
            (step, factor * value)
            for step, value in filter_finite((line.get("step"), line.get(key)) for line in lines)
        ]
        if not (smoothed := smooth_points(points)):
            return [ChartSeries(title, points)]
        return [ChartSeries(title, points, "faint"), ChartSeries(translate("smoothed"), smoothed)]

    evaluations = list_comparable_evaluations(run_record.evaluations)

    def build_split_chart(title: str, key: str, eval_key: str, note: str = "") -> Chart | None:
        """Build a chart of a value of all steps and of all evaluations."""
        points = filter_finite(
            (line.get("step"), read_metrics(line).get(eval_key)) for line in evaluations
        )
        series = read_series(translate("training"), key)
        validation = ChartSeries(translate("validation"), points, "marks")
        return build_chart(title, [*series, validation], note + subset_text)

    subset_text = _describe_subset(run_record.evaluations, evaluations, "num_loss_samples")
    is_sft = not any(key in line for line in run_record.steps[:1] for key in PAIR_METRICS)
    loss_text = translate("nats per supervised token" if is_sft else "mean over pairs")
    samples_text, mfu_text = translate("samples/s"), translate("% of the measured peak FLOPS")
    loss_charts = [build_split_chart(translate("Loss"), "loss", "validation_loss", loss_text)]
    if names := list_reward_names(run_record.steps):
        # A policy is not trained on the cross entropy of the reference answers.
        loss_charts = [
            *(_build_reward_chart(run_record, name) for name in names),
            *(
                build_chart(translate(title), read_series(translate("steps"), key), translate(text))
                for title, text, key in REWARD_CURVES
            ),
            build_split_chart(translate("Loss"), "loss", "", translate("of the policy")),
            build_split_chart(translate("Validation loss"), "", "validation_loss", loss_text),
        ]
    charts = [
        *loss_charts,
        *(build_split_chart(format_metric_name(key), key, key) for key in PAIR_METRICS),
        _build_primary_metric_chart(run_record),
        build_chart(translate("Learning rate"), _build_lr_series(run_record)),
        build_chart(
            translate("Gradient norm"),
            read_series(translate("norm"), "grad_norm"),
            translate("before clipping"),
        ),
        build_chart(
            translate("Throughput"), read_series(samples_text, "samples_per_s"), samples_text
        ),
        build_chart(translate("MFU"), read_series(translate("MFU"), "mfu", 100), mfu_text),
    ]
    return [chart for chart in charts if chart is not None]


def _build_reward_chart(run_record: RunRecord, name: str) -> Chart | None:
    """Build the chart of a reward: its mean in each step, and estimates for several steps."""
    steps = run_record.steps
    size = math.ceil(len(steps) / NUM_REWARD_ESTIMATES)
    rows = []
    for start in range(0, len(steps), size):
        lines = steps[start : start + size]
        estimate, margin = estimate_reward(run_record, lines, name)
        interval = estimate - margin, estimate + margin
        rows.append((mean(float(line["step"]) for line in lines), estimate, interval))
    points = filter_finite((x.get("step"), x.get(f"rewards/{name}/mean")) for x in steps)
    every_step = ChartSeries(translate("steps"), points, "faint")
    estimates = _build_estimates(translate("mean of {:,} steps", size), rows)
    title = translate("Reward: {}", format_metric_name(name))
    return build_chart(title, [every_step, estimates], translate("bars: 95 % intervals"))


def _build_primary_metric_chart(run_record: RunRecord) -> Chart | None:
    name = run_record.primary_metric
    if name is None:
        return None
    evaluations = list_comparable_evaluations(run_record.evaluations, "num_samples")
    rows = [(x.get("step"), read_metrics(x).get(name), read_interval(x, name)) for x in evaluations]
    title = format_metric_name(name)
    series = _build_estimates(title, rows)
    note = translate("validation, bars: 95 % intervals" if series.error_bars else "validation")
    note += _describe_subset(run_record.evaluations, evaluations, "num_samples")
    return build_chart(title, [series], note)


def _build_estimates(
    name: str, rows: Sequence[tuple[Any, float | None, IntervalBounds | None]]
) -> ChartSeries:
    """Build a series of values with error bars from rows of step, value and interval."""
    points = filter_finite((step, value) for step, value, _ in rows)
    bars = [
        (float(step), *interval) for step, value, interval in rows if interval and is_finite(value)
    ]
    return ChartSeries(name, points, "marks", bars)


def _describe_subset(
    all_lines: Sequence[JsonObject], evaluations: Sequence[JsonObject], count: str
) -> str:
    """Describe the validation samples of a curve, if they are not all samples; otherwise empty."""
    _, num_samples = get_sample_set(evaluations[-1], count) if evaluations else (None, None)
    has_others = len(evaluations) < len(all_lines) or any(line.get("full") for line in all_lines)
    if not has_others or not isinstance(num_samples, int):
        return ""
    return translate("; validation on the same {:,} samples", num_samples)


def _build_lr_series(run_record: RunRecord) -> list[ChartSeries]:
    """Return the learning rate of each part of the model. Parts with equal values share a line."""
    values = [
        (line.get("step"), line["lr"])
        for line in run_record.steps
        if isinstance(line.get("lr"), dict)
    ]
    parts_by_line: dict[tuple[Point, ...], list[str]] = {}
    for part in dict.fromkeys(part for _, lr_by_part in values for part in lr_by_part):
        points = filter_finite((step, lr_by_part.get(part)) for step, lr_by_part in values)
        parts_by_line.setdefault(tuple(points), []).append(part)
    return [ChartSeries(", ".join(parts), points) for points, parts in parts_by_line.items()]
