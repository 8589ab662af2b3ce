"""Pictures within pages."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from finesight.report.picture import picture, picture_data


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_smaller_kind_is_taken() -> None:
    flat = Image.new("RGB", (64, 32), (10, 200, 30))
    assert picture_data(flat).startswith("data:image/png;base64,")
    assert np.array_equal(np.asarray(opened(picture_data(flat))), np.asarray(flat))
    assert picture_data(noise(64, 32)).startswith("data:image/jpeg;base64,")
    assert opened(picture_data(noise(64, 32))).size == (64, 32)


@pytest.mark.parametrize(
    ("size", "shown"), [((400, 200), (100, 50)), ((200, 400), (50, 100)), ((80, 40), (80, 40))]
)
def test_shrunk_but_never_enlarged(size: tuple[int, int], shown: tuple[int, int]) -> None:
    image = noise(*size)
    found = picture(image, 100)
    assert opened(found["src"]).size == shown
    assert (found["width"], found["height"]) == image.size == size
