"""Variants of images: regions follow their pixels, stay visible, and depend on their key only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from finesight.samples.augmentation import AugmentedSample, Augmenter, ImageVariant
from finesight.samples.sample import (
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    create_region,
)
from finesight.settings.config import AugmentSettings, DataSettings

WIDTH, HEIGHT = 120, 90
SIZE = (84, 112)
"""Height and width of the model input."""


def make_augmenter(preset: str = "strong", *, describes_scenes: bool = True) -> Augmenter:
    data = DataSettings.model_validate({"train": "a.jsonl", "augment": preset})
    assert data.augment is not None
    return Augmenter(data.augment, 0, describes_scenes)


def make_sample(folder: Path, boxes: list[tuple[float, ...]], question: str) -> LocatedSample:
    """Write a gray image with a red rectangle in each box."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "gray")
    for x1, y1, x2, y2 in boxes:
        ImageDraw.Draw(image).rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), fill="red")
    image.save(folder / "image.png")
    regions = [create_region(box, "red", is_point=box[:2] == box[2:]) for box in boxes]
    user = {"role": "user", "content": [ImagePart(image="image.png"), TextPart(text=question)]}
    answer = {"role": "assistant", "content": [*regions, TextPart(text="here")]}
    sample = Sample.model_validate({"id": "a", "messages": [user, answer]})
    return LocatedSample(sample, folder)


def augment(
    augmenter: Augmenter, sample: LocatedSample, key: int
) -> tuple[AugmentedSample, ImageVariant]:
    found = augmenter.augment(sample, key)
    assert isinstance(found, AugmentedSample)
    return found, found.variants[0]


coordinates = st.tuples(
    st.integers(0, 100), st.integers(0, 70), st.integers(16, 60), st.integers(16, 60)
)


@settings(max_examples=60, deadline=None)
@given(corners=coordinates, key=st.integers(0, 2**32))
def test_boxes_follow_their_pixels(tmp_path_factory, corners, key):
    x, y, width, height = corners
    box = (float(x), float(y), float(min(x + width, WIDTH)), float(min(y + height, HEIGHT)))
    sample = make_sample(tmp_path_factory.mktemp("one"), [box], "Where is it?")
    found, variant = augment(make_augmenter(), sample, key)
    variant = replace(variant, jpeg_quality=0)  # whose colors bleed
    image = variant.apply(Image.open(sample.resolve_path("image.png")), SIZE)
    assert image.size == SIZE[::-1], "the image keeps its number of tokens"
    red, green, _ = np.moveaxis(np.asarray(image, dtype=int), 2, 0)
    rows, columns = np.nonzero(red - green > 60)
    part = found.sample.messages[1].content[0]
    scaled = np.array(part.xyxy) * ([SIZE[1] / WIDTH, SIZE[0] / HEIGHT] * 2)
    pixels = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(scaled - pixels).max() <= 2
    assert 0 <= part.xyxy[0] < part.xyxy[2] <= WIDTH
    assert 0 <= part.xyxy[1] < part.xyxy[3] <= HEIGHT


WHOLE = [(0.0, 0.0), (WIDTH, 0.0), (0.0, HEIGHT), (WIDTH, HEIGHT)]


@pytest.mark.parametrize(
    ("question", "describes_scenes", "is_whole", "can_flip"),
    [
        ("What is it?", True, False, True),
        ("What is it?", False, True, False),
        ("How many are there?", True, True, True),
        ("一共有几个？", True, True, True),
        ("The cup on the left", True, False, False),
        ("the leftmost cup", True, False, False),
        ("the northwest corner", True, False, False),
        ("右边的杯子", True, False, False),
        ('Where does it say "stop"?', True, False, False),
    ],
)
def test_answers_stay_true(tmp_path, question, describes_scenes, is_whole, can_flip):
    """Images that are read or counted are never cropped, and texts and sides never mirrored."""
    sample = make_sample(tmp_path, [], question)
    augmenter = make_augmenter(describes_scenes=describes_scenes)
    variants = [augment(augmenter, sample, key)[1] for key in range(40)]
    assert any(variant.matrix[0] < 0 for variant in variants) == can_flip
    matrices = [np.array(variant.matrix).reshape(2, 3) for variant in variants]
    mapped = np.array([matrix @ [*point, 1.0] for matrix in matrices for point in WHOLE])
    is_inside = (mapped >= -1).all() and (mapped <= [WIDTH + 1, HEIGHT + 1]).all()
    assert is_inside == is_whole


@pytest.mark.parametrize(
    "text",
    [
        "Is there a cup at (12, 30)?",
        '{"x": 10, "y": 20}',
        "<box>10,20,30,40</box>",
        "<loc_10><loc_20>",
        '<point x="10" y="20">',
        "bbox: 10, 20, 30, 40",
        ToolCallPart(name="click", arguments={"coordinate": [10, 20]}),
    ],
)
def test_written_coordinates_keep_the_geometry(tmp_path, text):
    sample = make_sample(tmp_path, [], text if isinstance(text, str) else "Where?")
    if isinstance(text, ToolCallPart):
        answer = Message(role="assistant", content=(text,))
        messages = (sample.sample.messages[0], answer)
        sample = replace(sample, sample=sample.sample.model_copy(update={"messages": messages}))
    _, variant = augment(make_augmenter(), sample, 3)
    assert variant.matrix == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert variant.color != (1.0, 1.0, 1.0)


def test_variants_are_a_function_of_seed_and_key(tmp_path):
    sample = make_sample(tmp_path, [(30.0, 20.0, 70.0, 60.0), (90.0, 40.0, 90.0, 40.0)], "Where?")
    augmenter = make_augmenter()
    first = augmenter.augment(sample, 5, 2)
    assert augmenter.augment(sample, 5, 2) == first
    others = augmenter.augment(sample, 6, 2), replace(augmenter, seed=1).augment(sample, 5, 2)
    assert first not in others
    assert first.sample.messages[1].content[1].is_point


def test_zero_strengths_change_nothing(tmp_path):
    sample = make_sample(tmp_path, [(30.0, 20.0, 70.0, 60.0)], "Where?")
    found, variant = augment(Augmenter(AugmentSettings(), 0, True), sample, 1)
    assert found.sample == sample.sample
    image = Image.open(sample.resolve_path("image.png"))
    expected = image.resize(SIZE[::-1], Image.Resampling.BICUBIC)
    assert variant.apply(image, SIZE).tobytes() == expected.tobytes()
