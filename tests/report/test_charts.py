"""Tests of chart scales, downsampling and smoothing."""

import json
import math
import random
import re

import pytest
from case_files import load_cases

from finesight.report.charts import (
    HEIGHT,
    MARGIN_BOTTOM,
    MARGIN_LEFT,
    MARGIN_RIGHT,
    MARGIN_TOP,
    WIDTH,
    ChartSeries,
    build_chart,
    build_histogram,
    build_sparkline,
    compute_ticks,
    downsample,
    format_compact,
    parse_counts,
    smooth_points,
)
from finesight.report.histogram_counts import count_half_octaves

CASES = load_cases("charts")


@pytest.mark.parametrize(
    ("low", "high", "ticks"), CASES["test_ticks_are_round_and_cover_the_values"]
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert compute_ticks(low, high, 5, include_ends=True) == pytest.approx(ticks)


def test_step_ticks_are_integers() -> None:
    assert compute_ticks(1, 7, 6, integer_only=True) == [1, 2, 3, 4, 5, 6, 7]
    assert compute_ticks(0, 2, 6, integer_only=True) == [0, 1, 2]
    assert compute_ticks(1, 1200, 6, integer_only=True) == [200, 400, 600, 800, 1000, 1200]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.05, "0.05"), (2e-4, "2e-4"), (2.5e-5, "2.5e-5"), (1200, "1,200")),
        *((12000, "12k"), (2.5e6, "2.5M"), (-3.0, "-3")),
    ],
)
def test_tick_labels_are_short(value: float, text: str) -> None:
    assert format_compact(value) == text


def test_long_series_are_downsampled_with_spikes() -> None:
    points = [(float(step), math.sin(step / 900)) for step in range(100_000)]
    points[54_321] = (54_321.0, 50.0)
    points[7] = (7.0, -50.0)
    retained = downsample(points)
    assert len(retained) == 1000
    assert {points[54_321], points[7]} < set(retained)
    assert retained == sorted(retained)
    assert set(retained) < set(points)
    assert downsample(points[:1000]) == points[:1000]
    constant = downsample([(float(step), 1.0) for step in range(5000)])
    assert len(constant) == len(set(constant)) == 500


def test_sparkline_fills_its_box() -> None:
    steps = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (3, 2.0), (5, 3.0))]
    assert build_sparkline(steps) == "0.0,0.0 50.0,30.0 100.0,15.0"
    assert build_sparkline(steps[:1]) == ""
    assert build_sparkline([*steps[:2], {"step": 4, "loss": math.nan}]) == "0.0,0.0 100.0,30.0"
    assert build_sparkline([steps[0], {"step": 2, "loss": 4.0}]) == "0.0,30.0 100.0,30.0"
    assert len(build_sparkline([{"step": n, "loss": n % 7} for n in range(900)]).split()) <= 60


def test_smoothing_has_no_initial_lag() -> None:
    flat = smooth_points([(float(step), 2.0) for step in range(400)])
    assert [y for _, y in flat] == pytest.approx([2.0] * 400)
    zigzag = smooth_points([(float(step), 1.0 + (-1) ** step) for step in range(400)])
    assert all(0.8 < y < 1.2 for _, y in zigzag[50:])
    assert smooth_points([(float(step), 1.0) for step in range(19)]) == []


def test_chart_stays_within_its_frame() -> None:
    points = [(float(step), 3.0 - step / 10) for step in range(1, 31)]
    drawing = build_chart("Loss", [ChartSeries("training", points)])
    values = [float(number) for number in re.findall(r"-?[\d.]+", drawing.lines[0].path)]
    across, up = values[::2], values[1::2]
    assert (min(across), max(across)) == (MARGIN_LEFT, WIDTH - MARGIN_RIGHT)
    assert min(up) >= MARGIN_TOP
    assert max(up) <= HEIGHT - MARGIN_BOTTOM
    assert up == sorted(up), "falling values go down the page"
    assert drawing.data["series"][0]["points"][0] == (1.0, 2.9, "2.9")
    assert (drawing.data["x"], drawing.data["y"]) == ([1, 30], [0, 3])
    assert drawing.summary == "Loss: training 2.9 at step 1, 0 at step 30"
    assert [label for _, label in drawing.y_ticks] == ["0", "1", "2", "3"]


def test_single_point_is_a_marker_with_the_tick_of_its_step() -> None:
    drawing = build_chart("s", [ChartSeries("s", [(0.0, 1.0)]), ChartSeries("none", [])])
    assert drawing is not None
    (line,) = drawing.lines
    assert line.markers
    assert [label for _, label in drawing.x_ticks] == ["0"]
    assert build_chart("s", [ChartSeries("s", [])]) is None


def test_values_fall_into_half_octave_bins() -> None:
    chance = random.Random(0)
    values = [chance.randint(1, 100_000) for _ in range(2000)] + [1, 2, 4, 1024, 65536]
    for value in values:
        (name,) = count_half_octaves([value])
        # Exactly: the square of 2^(k/2) is 2^k.
        assert 2 ** int(name) <= value**2 < 2 ** (int(name) + 1), value
    counts = count_half_octaves(values)
    assert sum(counts.values()) == len(values)
    assert parse_counts(json.loads(json.dumps(counts))) == counts
    assert count_half_octaves([0, -1]) == {}
    odd = {"3": 1, "x": 1, "-1": 1, "999": 1, "4": -1, "5": "many", "6": None}
    assert parse_counts(odd) == {"3": 1}
    assert parse_counts([1]) == {}


def test_histograms_of_runs_share_bins() -> None:
    drawing = build_histogram(
        "Tokens", "", [("A", {"10": 1, "12": 3}), ("B", {}), ("C", {"11": 5})]
    )
    assert drawing is not None
    assert drawing.data["labels"] == ["32 to 45", "46 to 63", "64 to 90"]
    percentages = {
        one["name"]: [value for _, value, _ in one["points"]] for one in drawing.data["series"]
    }
    assert percentages == {"A": [25.0, 0.0, 75.0], "C": [0.0, 100.0, 0.0]}
    assert "A mostly 64 to 90" in drawing.summary
    assert build_histogram("Tokens", "", [("A", {})]) is None


def test_bin_without_integers_is_not_drawn() -> None:
    """Only damaged metrics have values in the bin from 2 ** 0.5 to 2."""
    assert build_histogram("Tokens", "", [("A", {"1": 3})]) is None
    drawing = build_histogram("Tokens", "", [("A", {"1": 3}), ("B", {"0": 1, "1": 6, "2": 3})])
    assert drawing is not None
    assert drawing.data["labels"] == ["1", "2"]
    (series,) = drawing.data["series"]
    assert [value for _, value, _ in series["points"]] == [25.0, 75.0]


EXTREMES = [0.0, 5e-324, 1e-310, 1.0, 1e16, 1e300, 1.7e308, -1.7e308]


@pytest.mark.parametrize("first", EXTREMES)
@pytest.mark.parametrize("last", EXTREMES)
def test_extreme_values_of_damaged_metrics_are_drawn_or_omitted(first: float, last: float) -> None:
    for ends in ([(0.0, first), (9.0, last)], [(first, 0.5), (last, 0.75)], [(first, last)]):
        bars = [(step, value, value) for step, value in ends]
        series = [ChartSeries("a", [(1.0, 1.0), (2.0, 3.0), *ends], error_bars=bars)]
        drawing = build_chart("Loss", series)
        assert drawing is not None
        for x, y in re.findall("(-?[0-9.]+) (-?[0-9.]+)", drawing.lines[0].path):
            assert MARGIN_LEFT <= float(x) <= WIDTH - MARGIN_RIGHT
            assert MARGIN_TOP <= float(y) <= HEIGHT - MARGIN_BOTTOM
        assert all(MARGIN_LEFT <= x <= WIDTH - MARGIN_RIGHT for x, _ in drawing.x_ticks)
        build_chart("Loss", [ChartSeries("a", ends, error_bars=bars)])


@pytest.mark.parametrize("step", [10.0**6, 10.0**15 - 1])
def test_ticks_of_close_large_steps_are_in_the_chart(step: float) -> None:
    drawing = build_chart("Loss", [ChartSeries("a", [(step, 1.0), (step + 1, 2.0)])])
    assert drawing is not None
    assert all(MARGIN_LEFT <= x <= WIDTH - MARGIN_RIGHT for x, _ in drawing.x_ticks)
