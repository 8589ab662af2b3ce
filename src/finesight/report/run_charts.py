"""Charts of a run report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finesight.report.charts import Chart, ChartSeries, build_chart, filter_finite, smooth_points
from finesight.report.i18n import translate
from finesight.report.metrics import format_metric_name, read_interval
from finesight.report.run_reader import JsonObject, RunRecord


def build_run_charts(run_record: RunRecord) -> list[Chart]:
    """Build the charts of a run report, without charts that have no values.

    They show loss, primary metric, learning rate, gradient norm, throughput and MFU.
    """
    steps = run_record.steps
    charts = [
        build_chart(
            translate("Loss"),
            [
                *_build_smoothed_series(translate("training"), _read_points(steps, "loss")),
                _build_validation_series(run_record),
            ],
            translate("nats per supervised token"),
        ),
        *_build_primary_metric_chart(run_record),
        build_chart(translate("Learning rate"), _build_lr_series(steps)),
        build_chart(
            translate("Gradient norm"),
            _build_smoothed_series(translate("norm"), _read_points(steps, "grad_norm")),
            translate("before clipping"),
        ),
        build_chart(
            translate("Throughput"),
            _build_smoothed_series(translate("samples/s"), _read_points(steps, "samples_per_s")),
            translate("samples/s"),
        ),
        build_chart(
            translate("MFU"),
            _build_smoothed_series(
                translate("MFU"),
                [(x, 100 * y) for x, y in _read_points(steps, "mfu")],
            ),
            translate("% of the measured peak FLOPS"),
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _read_points(lines: Sequence[JsonObject], name: str) -> list[tuple[float, float]]:
    return filter_finite((line.get("step"), line.get(name)) for line in lines)


def _build_smoothed_series(name: str, points: Sequence[tuple[float, float]]) -> list[ChartSeries]:
    """Return a series and, if it has many points, its smoothed version."""
    smoothed = smooth_points(points)
    if not smoothed:
        return [ChartSeries(name, points)]
    return [ChartSeries(name, points, "faint"), ChartSeries(translate("smoothed"), smoothed)]


def _build_validation_series(run_record: RunRecord) -> ChartSeries:
    return ChartSeries(
        translate("validation"), _read_points(run_record.evaluations, "validation_loss"), "marks"
    )


def _build_primary_metric_chart(run_record: RunRecord) -> list[Chart | None]:
    names = [
        line["primary_metric"] for line in run_record.evaluations if line.get("primary_metric")
    ]
    if not names:
        return []
    name = str(names[-1])
    points, error_bars = [], []
    for line in run_record.evaluations:
        scores: Any = line.get("scores")
        points += filter_finite([(line.get("step"), scores.get(name) if scores else None)])
        interval = read_interval(line, name)
        if interval is not None:
            error_bars.append((float(line["step"]), *interval))
    note = translate("validation, bars: 95 % intervals" if error_bars else "validation")
    title = format_metric_name(name)
    return [build_chart(title, [ChartSeries(title, points, "marks", error_bars)], note)]


def _build_lr_series(steps: Sequence[JsonObject]) -> list[ChartSeries]:
    """Return the learning rate of each part of the model.

    Parts with equal learning rates share a line.
    """
    lr_by_step = [
        (line.get("step"), line["lr"]) for line in steps if isinstance(line.get("lr"), dict)
    ]
    parts = dict.fromkeys(part for _, lr_by_part in lr_by_step for part in lr_by_part)
    lines = {
        part: filter_finite((step, lr_by_part.get(part)) for step, lr_by_part in lr_by_step)
        for part in parts
    }
    groups: list[tuple[list[str], list[tuple[float, float]]]] = []
    for part, points in lines.items():
        matching = next((names for names, other in groups if other == points), None)
        if matching is None:
            groups.append(([part], points))
        else:
            matching.append(part)
    return [ChartSeries(", ".join(names), points) for names, points in groups]
