"""Streets: boxes among clutter hold their words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from finesight.data.sample import BoxPart
from finesight.synth import sheet, streets


@pytest.fixture(scope="module")
def drawn():
    return [streets.street(random.Random(number), "built-in") for number in range(120)]


def _box(each):
    (box,) = [part for part in (*each.question, *each.answer) if isinstance(part, BoxPart)]
    return tuple(map(int, box.xyxy))


def test_one_word_is_asked_for(drawn):
    assert {each.kind for each in drawn} == {"find", "read_at"}
    for each in drawn:
        width, height = each.picture.size
        x1, y1, x2, y2 = _box(each)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_words_stand_out_where_their_boxes_are(drawn):
    for each in drawn:
        x1, y1, x2, y2 = _box(each)
        crop = np.asarray(each.picture.convert("L"), dtype=float)[y1:y2, x1:x2]
        assert np.ptp(np.percentile(crop, (2, 98))) > 30, f"nothing is written at {_box(each)}"


def test_sides_are_whole_squares_within_bounds(drawn):
    for each in drawn:
        for side, bounds in zip(each.picture.size, (streets.ACROSS, streets.DOWN), strict=True):
            assert side % sheet.SQUARE == 0
            assert bounds[0] <= side // sheet.SQUARE <= bounds[1]


def test_clutter_is_not_plain():
    pictures = [streets.cluttered((112, 84), random.Random(number)) for number in range(20)]
    assert all(np.asarray(picture).std() > 8 for picture in pictures)
    assert all(picture.size == (112, 84) for picture in pictures)
