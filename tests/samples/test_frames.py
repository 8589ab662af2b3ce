"""Coordinate frames of boxes, against boxes worked out by hand and Pillow's own turns."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from finesight.samples.frames import PIXELS, BoxFrame, get_frame


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_maps_box_like_pillow(turn: int) -> None:
    stored = np.zeros((60, 90), np.uint8)
    stored[10:25, 50:80] = 255
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = turn
    upright = np.asarray(ImageOps.exif_transpose(image))
    rows, columns = np.nonzero(upright)
    expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    height, width = upright.shape
    (fractions,) = BoxFrame(base="stored").to_fractions(
        np.array([[50.0, 10.0, 80.0, 25.0]]),
        np.array([float(height)]),
        np.array([float(width)]),
        np.array([turn]),
    )
    assert fractions * (width, height, width, height) == pytest.approx(expected)


PATCHES = BoxFrame("xyxy", "pixels", 448, 448, is_capped=True, side_multiple=28)


@pytest.mark.parametrize(
    ("frame", "size", "sides"),
    [
        (BoxFrame("xyxy", "factor", 0.5, 0.5), (200, 100), (100, 50)),
        (BoxFrame("xyxy", "longest", 100, 100), (200, 100), (100, 50)),
        (BoxFrame("xyxy", "shortest", 50, 50), (200, 100), (100, 50)),
        (BoxFrame("xyxy", "pixels", 5000**0.5, 0), (200, 100), (100, 50)),
        (BoxFrame("xyxy", "fixed", 64, 48), (200, 100), (64, 48)),
        (BoxFrame("xyxy", "longest", 400, 400), (200, 100), (400, 200)),
        (BoxFrame("xyxy", "longest", 400, 400, is_capped=True), (200, 100), (200, 100)),
        # 448 x 448 pixels are a factor of 0.578: 20.6 and 12.4 cells of 28 pixels.
        (PATCHES, (1000, 600), (560, 336)),
        (PATCHES, (300, 200), (308, 196)),
        (PATCHES, (20, 30), (28, 28)),
    ],
)
def test_resized_frame_size(frame, size, sides):
    height, width = frame.compute_size(np.array([float(size[1])]), np.array([float(size[0])]))
    assert (*np.ravel(width), *np.ravel(height)) == pytest.approx(sides)


HEIGHTS = np.array([100.0, 200.0])
WIDTHS = np.array([200.0, 400.0])


@pytest.mark.parametrize(
    ("frame", "values"),
    [
        (PIXELS, [(50, 10, 150, 40), (100, 20, 300, 80)]),
        (get_frame("xywh", "pixel"), [(50, 10, 100, 30), (100, 20, 200, 60)]),
        (get_frame("yxyx", "1000"), [(100, 250, 400, 750)] * 2),
        (get_frame("cxcywh", "1"), [(0.5, 0.25, 0.5, 0.3)] * 2),
        (BoxFrame("xyxy", "factor", 0.5, 0.5), [(25, 5, 75, 20), (50, 10, 150, 40)]),
    ],
)
def test_fractions_of_boxes_in_images_of_two_sizes(frame, values):
    fractions = frame.to_fractions(np.array(values, float), HEIGHTS, WIDTHS)
    assert fractions == pytest.approx(np.array([[0.25, 0.1, 0.75, 0.4]] * 2))


def test_fractions_of_stored_images_need_orientations():
    with pytest.raises(ValueError, match="EXIF orientation"):
        BoxFrame(base="stored").to_fractions(np.zeros((2, 4)), HEIGHTS, WIDTHS)
