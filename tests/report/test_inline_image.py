"""Tests of embedded images."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from finesight.report.html import build_inline_image


def decode_data_url(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_smaller_encoding_is_used() -> None:
    flat = Image.new("RGB", (64, 32), (10, 200, 30))
    assert build_inline_image(flat)["src"].startswith("data:image/png;base64,")
    assert np.array_equal(
        np.asarray(decode_data_url(build_inline_image(flat)["src"])), np.asarray(flat)
    )
    assert build_inline_image(noise(64, 32))["src"].startswith("data:image/jpeg;base64,")
    assert decode_data_url(build_inline_image(noise(64, 32))["src"]).size == (64, 32)


@pytest.mark.parametrize(
    ("size", "shown"), [((400, 200), (100, 50)), ((200, 400), (50, 100)), ((80, 40), (80, 40))]
)
def test_images_are_downscaled_but_not_enlarged(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    image = noise(*size)
    found = build_inline_image(image, 100)
    assert decode_data_url(found["src"]).size == shown
    assert (found["width"], found["height"]) == image.size == size
