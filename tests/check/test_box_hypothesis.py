"""Readings of numbers, against boxes worked out by hand and Pillow's own turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from finesight.check.box_hypothesis import (
    BoxClaim,
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    find_invalid_boxes,
    hypothesis_from_convention,
    pairwise_iou,
)
from finesight.data.boxes import BoxConvention, BoxFormat, BoxUnits

Coordinates = tuple[float, float, float, float]


def table(*values: Coordinates, size: tuple[int, int] = (100, 200), turn: int = 1) -> BoxClaimTable:
    return BoxClaimTable(
        [BoxClaim("", str(n), Path("p"), size, turn, box) for n, box in enumerate(values)]
    )


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_maps_box_like_pillow(turn: int) -> None:
    stored = np.zeros((60, 90), np.uint8)
    stored[10:25, 50:80] = 255
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = turn
    upright = np.asarray(ImageOps.exif_transpose(image))
    rows, columns = np.nonzero(upright)
    expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    claims = table((50, 10, 80, 25), size=upright.shape, turn=turn)
    shares = BoxHypothesis("xyxy", BoxFrame("stored")).normalize_boxes(claims)[0]
    height, width = upright.shape
    assert shares * (width, height, width, height) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("format", "units", "values"),
    [
        ("xyxy", "pixel", (20, 30, 60, 80)),
        ("xywh", "pixel", (20, 30, 40, 50)),
        ("cxcywh", "pixel", (40, 55, 40, 50)),
        ("xyxy", "1000", (100, 300, 300, 800)),
        ("xywh", "1", (0.1, 0.3, 0.2, 0.5)),
    ],
)
def test_all_box_formats_give_the_same_box(
    format: BoxFormat, units: BoxUnits, values: Coordinates
) -> None:
    shares = hypothesis_from_convention(BoxConvention(format, units)).normalize_boxes(table(values))
    assert shares[0] == pytest.approx((0.1, 0.3, 0.3, 0.8))


@pytest.mark.parametrize(
    ("frame", "sides"),
    [
        (BoxFrame("factor", 0.5, 0.5), (100, 50)),
        (BoxFrame("longest", 100, 100), (100, 50)),
        (BoxFrame("shortest", 50, 50), (100, 50)),
        (BoxFrame("pixels", 5000**0.5, 0), (100, 50)),
        (BoxFrame("fixed", 64, 48), (64, 48)),
        (BoxFrame("longest", 400, 400), (400, 200)),
        (BoxFrame("longest", 400, 400, is_capped=True), (200, 100)),
    ],
)
def test_resized_frame_size(frame: BoxFrame, sides: tuple[float, float]) -> None:
    across, down = frame.compute_size(np.array([200.0]), np.array([100.0]))
    assert (across[0], down[0]) == pytest.approx(sides)


@pytest.mark.parametrize(
    ("size", "sides"), [((1000, 600), (560, 336)), ((300, 200), (308, 196)), ((20, 30), (28, 28))]
)
def test_resized_frame_size_on_patch_grid(size: tuple[int, int], sides: tuple[int, int]) -> None:
    """1000 x 600 of 448 x 448 pixels is a factor of 0.578: 20.6 and 12.4 cells of 28 pixels."""
    frame = BoxFrame("pixels", 448, 448, is_capped=True, side_multiple=28)
    across, down = frame.compute_size(np.array([float(size[0])]), np.array([float(size[1])]))
    assert (across[0], down[0]) == sides


def test_impossible_boxes_are_flagged() -> None:
    boxes: list[tuple[Coordinates, bool]] = [
        ((10, 10, 50, 50), False),
        ((0, 0, 200, 100), False),
        ((-1, 0, 201, 100), False),
        ((50, 10, 10, 50), True),
        ((10, 10, 10, 50), True),
        ((10, 10, 205, 50), True),
        ((-4, 10, 50, 50), True),
        ((0.1, 0.1, 0.8, 0.9), True),
        ((0.1, 10, 0.8, 60), False),
        ((float("nan"), 0, 1, 1), True),
    ]
    claims = table(*(box for box, _ in boxes))
    found = find_invalid_boxes(
        hypothesis_from_convention(BoxConvention()).normalize_boxes(claims), claims
    )
    assert found.tolist() == [expected for _, expected in boxes]


def test_overlap_is_intersection_over_union() -> None:
    one = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]], float)
    other = np.array([[1, 0, 3, 2], [0, 0, 1, 1], [2, 2, 3, 3]], float)
    assert pairwise_iou(one, other) == pytest.approx((1 / 3, 1, 0))


def test_samples_are_counted_once() -> None:
    box = (0.0, 0.0, 5.0, 5.0)
    claims = [BoxClaim("1", "a", Path("p"), (9, 9), 1, box)] * 3
    claims.append(BoxClaim("2", "a", Path("q"), (9, 9), 1, box))
    found = BoxClaimTable(claims)
    assert (found.num_samples, len(found.image_paths)) == (2, 2)
    assert found.count_samples(np.array([True, True, False, False])) == 1
