"""Boxes in the text of an answer, as JSON and in the marks of Qwen2-VL, read and written."""

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import summarize_content
from case_files import load_cases
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.families.qwen2_5_vl.renderer import Qwen25VL
from finesight.ingest.formats.conversation_rows import format_answer, parse_answer
from finesight.ingest.formats.dataset_format import ImportContext, RowImages
from finesight.ingest.image_resolver import ImageResolver
from finesight.samples.frames import PIXELS, ImageSizes
from finesight.samples.sample import BoxPart, ContentPart, TextPart, create_region
from finesight.settings.config import PixelRange
from finesight.vision.image_processing import compute_resized_size

CASES = load_cases("answer_boxes")


def answer(folder: Path, text: str, *images: str) -> list[Any]:
    """Parse an answer about an image of 1000 x 500 pixels, or about the given images."""
    scene = RowImages(ImportContext(ImageResolver(folder, folder / "out")))
    for image in images or ("b.png",):
        scene.add_image(image)
    return summarize_content(tuple(parse_answer(text, scene)))


@pytest.mark.parametrize(("text", "parts"), CASES["test_answer_is_parsed"])
def test_answer_is_parsed(folder: Path, text: str, parts: list[Any]) -> None:
    found = [one if isinstance(one, str) else [one[1], *one[2]] for one in answer(folder, text)]
    assert found == [one if isinstance(one, str) else pytest.approx(one) for one in parts]


@pytest.mark.parametrize("size", [(500, 1000), (41, 30), (3001, 6007)])
def test_answers_of_qwen25_vl_are_in_resized_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    write_gray_image(tmp_path / f"{size[0]}.png", size[1], size[0])
    frame = compute_resized_size(size, PixelRange(min_pixels=3136, max_pixels=12845056), 28)
    half_unit = max(side / resized for side, resized in zip(size, frame, strict=True)) / 2
    x, y = 0.1 * size[1], 0.2 * size[0]
    point = create_region((x, y, x, y), "a", is_point=True)
    box = BoxPart(label="a", xyxy=(x, y, 0.9 * size[1], 0.7 * size[0]))
    images = [ImageSizes(size, frame)]
    for segments in ([[box]], [[point]], ['{"polygon_2d": [', [point], "]}"]):
        context = ImportContext(ImageResolver(tmp_path, tmp_path / "out"), box_units="resized")
        scene = RowImages(context)
        scene.add_image(f"{size[0]}.png")
        text = "".join(map(str, Qwen25VL().write_segments(segments, images)))
        found = [one.xyxy for one in parse_answer(text, scene) if isinstance(one, BoxPart)]
        expected = [one[0].xyxy for one in segments if not isinstance(one, str)]
        assert found == [pytest.approx(one, abs=half_unit + 1e-6) for one in expected], text
    with pytest.raises(UserError, match=r"units of resized.*outside its image") as caught:
        scene.create_box([0, 0, frame[1] + 40, 9], "a", PIXELS)
    assert "give --box-units pixel, 1, 100, 1000 or resized" in caught.value.remedy


def test_order_of_boxes_applies_to_lists_of_four_alone(folder: Path) -> None:
    """Tags state their order, and points have x first."""
    context = ImportContext(ImageResolver(folder, folder / "out"), box_format="yxyx")
    scene = RowImages(context)
    scene.add_image("b.png")
    (box,) = parse_answer('{"bbox_2d": [1, 2, 3, 4]}', scene)
    assert isinstance(box, BoxPart)
    assert box.xyxy == (2, 1, 4, 3)
    (point,) = parse_answer('{"point_2d": [1, 2]}', scene)
    assert isinstance(point, BoxPart)
    assert point.xyxy == (1, 2, 1, 2)
    with pytest.raises(UserError, match="in special tokens, with --box-format yxyx"):
        list(parse_answer("<loc0102><loc0512><loc0307><loc0819> cat", scene))


def test_written_text_reads_back_the_same(folder: Path) -> None:
    box = BoxPart(xyxy=(1, 2.5, 3, 4), label='a "b"')
    point = create_region((5, 6, 5, 6), None, is_point=True)
    content = (TextPart(text="In [1]: "), box, BoxPart(xyxy=(5, 6, 7, 8)), TextPart(text="!"))
    text = format_answer(content, 1)
    assert text == (
        'In [1]: [{"bbox_2d": [1, 2.5, 3, 4], "label": "a \\"b\\""}, {"bbox_2d": [5, 6, 7, 8]}]!'
    )
    assert format_answer((point, point), 1) == '[{"point_2d": [5, 6]}, {"point_2d": [5, 6]}]'
    assert answer(folder, text) == summarize_content(content)


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ((BoxPart(xyxy=(1, 2, 3, 4)),), 2),
        ((TextPart(text="["), BoxPart(xyxy=(1, 2, 3, 4)), TextPart(text="]")), 1),
        ((TextPart(text='{"bbox_2d": [1, 2, 3, 4]}'),), 1),
        ((TextPart(text="its bbox_2d"),), 1),
        ((TextPart(text="an <image>"),), 1),
        ((BoxPart(xyxy=(1, 2, 3, 4), label="<bbox>"),), 1),
    ],
)
def test_ambiguous_text_is_not_written(content: tuple[ContentPart, ...], images: int) -> None:
    with pytest.raises(UserError) as caught:
        format_answer(content, images)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize(("text", "what"), CASES["test_invalid_boxes_are_rejected"])
def test_invalid_boxes_are_rejected(folder, text, what):
    with pytest.raises(UserError, match=what):
        answer(folder, text)
    with pytest.raises(UserError, match="2 images"):
        answer(folder, '{"bbox_2d": [1, 2, 3, 4]}', "a.png", "b.png")


def test_action_about_several_images_stays_text(folder: Path) -> None:
    action = '{"action": "click", "point_2d": [1, 2]}'
    assert answer(folder, action, "a.png", "b.png") == [action]
