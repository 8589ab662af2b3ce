"""Streets: boxes among clutter hold their words."""

from __future__ import annotations

import random

import numpy as np
import pytest
from synthetic_tasks import backgrounds, streets

from finesight.samples.sample import BoxPart


@pytest.fixture(scope="module")
def street_samples():
    return [streets.generate_street(random.Random(number), "built-in") for number in range(120)]


def _box(each):
    (box,) = [part for part in (*each.question, *each.answer) if isinstance(part, BoxPart)]
    return tuple(map(int, box.xyxy))


def test_question_asks_for_one_word(street_samples):
    assert {each.task_kind for each in street_samples} == {"find", "read_at"}
    for each in street_samples:
        width, height = each.image.size
        x1, y1, x2, y2 = _box(each)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_words_have_contrast_inside_their_boxes(street_samples):
    for each in street_samples:
        x1, y1, x2, y2 = _box(each)
        crop = np.asarray(each.image.convert("L"), dtype=float)[y1:y2, x1:x2]
        assert np.ptp(np.percentile(crop, (2, 98))) > 30, f"nothing is written at {_box(each)}"


def test_image_sides_are_multiples_of_token_size(street_samples):
    for each in street_samples:
        for side, bounds in zip(
            each.image.size, (streets.COLUMN_RANGE, streets.ROW_RANGE), strict=True
        ):
            assert side % backgrounds.TOKEN_SIZE == 0
            assert bounds[0] <= side // backgrounds.TOKEN_SIZE <= bounds[1]


def test_clutter_has_texture():
    images = [streets.draw_clutter((112, 84), random.Random(number)) for number in range(20)]
    assert all(np.asarray(image).std() > 8 for image in images)
    assert all(image.size == (112, 84) for image in images)
