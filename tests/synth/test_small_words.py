"""Small words: unreadable in the resized image, whose box is that of the demonstrated call."""

import random

import numpy as np
import pytest
from PIL import Image, ImageChops

from finesight.errors import UserError
from finesight.samples.frames import rescale
from finesight.samples.sample import ImagePart, read_samples
from finesight.synth.small_words import (
    IMAGE_SIDE,
    build_zoom_call,
    draw_small_word,
    sample_word,
    write_small_words,
)


def test_more_words_extend_fewer(tmp_path):
    few = write_small_words(tmp_path / "few", 3, seed=5)
    more = write_small_words(tmp_path / "more", 5, seed=5)
    other = write_small_words(tmp_path / "other", 3, seed=6)
    assert more[:3] == few
    assert [task.sample for task in other] != [task.sample for task in few]
    assert [task.sample for task in more] == read_samples(tmp_path / "more" / "data.jsonl")
    for task in few:
        image, _ = task.sample.messages[0].content
        assert isinstance(image, ImagePart)
        files = [tmp_path / name / image.image for name in ("few", "more")]
        assert files[0].read_bytes() == files[1].read_bytes()
        with Image.open(files[0]) as opened:
            assert opened.size == (IMAGE_SIDE, IMAGE_SIDE)
    with pytest.raises(UserError, match="exists"):
        write_small_words(tmp_path / "few", 3, seed=5)


@pytest.mark.parametrize("frame", [(1000, 1000), (224, 224)])
def test_call_has_the_box_of_the_word(frame):
    for number in range(40):
        rng = random.Random(number)
        image, box = draw_small_word(sample_word(rng), rng)
        paper = Image.new("RGB", image.size, image.getpixel((0, 0)))
        ink = ImageChops.difference(image, paper).getbbox()
        assert ink is not None
        # The box has the advance width of the last letter.
        assert np.allclose(ink, box, atol=5)
        # At 224 pixels per side, x-heights have fewer than 4 pixels.
        assert (ink[3] - ink[1]) * 224 / IMAGE_SIDE < 6
        corners = build_zoom_call(box, frame).arguments["bbox_2d"]
        assert all(isinstance(value, int) for value in corners)
        assert np.allclose(rescale(corners, frame, image.size), box, atol=IMAGE_SIDE / frame[0])


def test_words_are_short():
    words = [sample_word(random.Random(number)) for number in range(200)]
    assert all(3 <= len(word) <= 5 and word.isascii() for word in words)
    assert 30 < sum(word.isdigit() for word in words) < 90
    assert len(set(words)) > 180
