"""Scales, thinning and smoothing of curves."""

from __future__ import annotations

import math
import re

import pytest

from finesight.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    compact,
    draw,
    exact,
    finite,
    round_ticks,
    smooth,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0013, 6.26, [0, 2, 4, 6, 8]),
        (-1.0, 3.0, [-1, 0, 1, 2, 3]),
        (1e-5, 8e-4, [0, 2e-4, 4e-4, 6e-4, 8e-4]),
        (0.995, 0.9953, [0.995, 0.9951, 0.9952, 0.9953]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
        (40.0, 40.0 + 1e-14, [20, 30, 40, 50, 60]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, 5, beyond=True) == pytest.approx(ticks)


def test_ticks_of_steps_are_whole_numbers_within() -> None:
    assert round_ticks(1, 7, 6, whole=True) == [1, 2, 3, 4, 5, 6, 7]
    assert round_ticks(0, 2, 6, whole=True) == [0, 1, 2]
    assert round_ticks(1, 1200, 6, whole=True) == [200, 400, 600, 800, 1000, 1200]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.05, "0.05"), (2e-4, "2e-4"), (2.5e-5, "2.5e-5"), (1200, "1,200")),
        *((12000, "12k"), (2.5e6, "2.5M"), (-3.0, "-3")),
    ],
)
def test_labels_are_short(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1.5e-5, "1.500e-05"), (12345.67, "12,345.7"), (0.0, "0")],
)
def test_values_are_read_to_four_digits(value: float, text: str) -> None:
    assert exact(value) == text


def test_long_lines_are_thinned_and_keep_every_spike() -> None:
    points = [(float(step), math.sin(step / 900)) for step in range(100_000)]
    points[54_321] = (54_321.0, 50.0)
    points[7] = (7.0, -50.0)
    kept = thin(points)
    assert len(kept) == 1000
    assert {points[54_321], points[7]} < set(kept)
    assert kept == sorted(kept)
    assert set(kept) < set(points)
    assert thin(points[:1000]) == points[:1000]


def test_a_flat_line_is_thinned_too() -> None:
    kept = thin([(float(step), 1.0) for step in range(5000)])
    assert len(kept) == 500
    assert len(set(kept)) == 500


def test_smoothing_follows_without_lagging_at_the_start() -> None:
    flat = smooth([(float(step), 2.0) for step in range(400)])
    assert [y for _, y in flat] == pytest.approx([2.0] * 400)
    zigzag = smooth([(float(step), 1.0 + (-1) ** step) for step in range(400)])
    assert all(0.8 < y < 1.2 for _, y in zigzag[50:])
    assert smooth([(float(step), 1.0) for step in range(19)]) == []


def test_what_is_no_number_is_no_point() -> None:
    assert finite([(1, 0.5), (2, None), (3, math.nan), (4, math.inf), (None, 1), ("5", 1)]) == [
        (1.0, 0.5)
    ]


def _numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_a_drawing_stays_within_its_frame() -> None:
    points = [(float(step), 3.0 - step / 10) for step in range(1, 31)]
    drawing = draw("Loss", [Series("training", points)])
    assert drawing is not None
    numbers = _numbers(drawing.lines[0].path)
    across, up = numbers[::2], numbers[1::2]
    assert (min(across), max(across)) == (LEFT, WIDTH - RIGHT)
    assert min(up) >= TOP
    assert max(up) <= HEIGHT - BOTTOM
    assert up == sorted(up), "falling values go down the page"
    assert drawing.data["series"][0]["points"][0] == (1.0, 2.9, "2.9")
    assert drawing.summary == "Loss: training 2.9 at step 1, 0 at step 30"
    assert [tick.label for tick in drawing.up] == ["0", "1", "2", "3"]


def test_marks_and_whiskers_have_their_places() -> None:
    drawing = draw("s", [Series("s", [(0, 0.5), (10, 0.75)], "marks", [(10, 0.25, 1.0)])])
    assert drawing is not None
    (line,) = drawing.lines
    assert len(line.marks) == 2
    ((x, high, low),) = line.whiskers
    assert x == line.marks[1][0]
    assert high < line.marks[1][1] < low
    assert (drawing.data["y"][0], drawing.data["y"][1]) == (0.2, 1.0)


def test_one_point_is_a_mark_and_no_points_are_no_chart() -> None:
    drawing = draw("s", [Series("s", [(5, 1.0)]), Series("none", [])])
    assert drawing is not None
    assert len(drawing.lines) == 1
    assert drawing.lines[0].marks
    assert draw("s", [Series("s", [])]) is None
