"""Every form of a box means the same corners in pixels."""

from __future__ import annotations

from typing import get_args

import pytest

from finesight.data.boxes import Box, BoxForm, BoxFormat, BoxUnits, fitted, four_numbers, iou
from finesight.errors import UserError

SIZE = (200, 500)
CORNERS: Box = (50.0, 20.0, 150.0, 80.0)
PIXELS = {
    "xyxy": (50, 20, 150, 80),
    "xywh": (50, 20, 100, 60),
    "cxcywh": (100, 50, 100, 60),
}


@pytest.mark.parametrize("units", get_args(BoxUnits))
@pytest.mark.parametrize("form", get_args(BoxFormat))
def test_every_form_gives_the_same_corners(form: BoxFormat, units: BoxUnits) -> None:
    height, width = SIZE
    whole = {"pixel": None, "1": 1, "1000": 1000}[units]
    sides = (width, height, width, height)
    numbers = PIXELS[form]
    if whole is not None:
        numbers = tuple(n / side * whole for n, side in zip(numbers, sides, strict=True))
    assert BoxForm(form, units).to_pixels(numbers, SIZE) == pytest.approx(CORNERS, abs=1e-9)


def test_a_pixel_outside_is_rounding() -> None:
    assert fitted((-1.0, 0.0, 500.6, 201.0), SIZE, BoxForm()) == (0.0, 0.0, 500.0, 200.0)
    assert fitted(CORNERS, SIZE, BoxForm()) == CORNERS


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ((0, 0, 502, 100), "outside of its picture"),
        ((-2, 0, 50, 100), "outside of its picture"),
        ((0, 0, 50, 202), "outside of its picture"),
        ((500.2, 0, 500.8, 50), "outside of its picture"),
        ((50, 0, 40, 100), "reversed or has no area"),
        ((50, 30, 60, 30), "reversed or has no area"),
        ((float("nan"), 0, 60, 30), "reversed or has no area"),
        ((0, 0, float("inf"), 30), "reversed or has no area"),
    ],
)
def test_refused(box: Box, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        fitted(box, SIZE, BoxForm())
    assert "xywh" in caught.value.remedy
    assert "500" in caught.value.expected


@pytest.mark.parametrize("value", [[1, 2, 3], [1, 2, 3, 4, 5], "1234", [1, 2, 3, None], 5, [[1]]])
def test_not_four_numbers(value: object) -> None:
    with pytest.raises(UserError, match="the box"):
        four_numbers(value)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(UserError, match="the box"):
        four_numbers([1, 2, 3, 10**400])


def test_thousandths_give_the_nearest_float() -> None:
    assert BoxForm(units="1000").to_pixels((588, 0, 725, 1000), (480, 360))[0] == 211.68


def test_numbers_may_be_text() -> None:
    assert four_numbers(["1", 2, "3.5", 4.0]) == [1.0, 2.0, 3.5, 4.0]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0),
        ((0, 0, 0, 10), (0, 0, 0, 10), 0),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)
