"""Boxes in the text of an answer, as JSON and in the marks of Qwen2-VL, read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from box_fixtures import summarize_content
from case_files import load_cases

from finesight.data.formats.conversation_rows import format_answer, parse_answer
from finesight.data.formats.dataset_format import ImportContext, RowImages
from finesight.data.image_resolver import ImageResolver
from finesight.data.sample import BoxPart, ContentPart, ImagePart, TextPart
from finesight.errors import UserError

CASES = load_cases("answer_boxes")


def answer(folder: Path, text: str, *images: str) -> list[object]:
    """Parse an answer about an image of 1000 x 500 pixels, or about the given images."""
    scene = RowImages(ImportContext(ImageResolver(folder, folder / "out")))
    for image in images or ("b.png",):
        scene.add_image(image)
    return summarize_content(tuple(parse_answer(text, scene)))


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "```\n{}```"])
def test_json_lists_and_code_fences(folder: Path, fence: str) -> None:
    boxes = [
        {"bbox_2d": [1, 2, 3, 4], "label": "a [b]"},
        {"bbox_2d": [5, 6, 7, 8], "text_content": "c"},
        {"bbox_2d": [5, 6, 7, 9]},
    ]
    assert answer(folder, fence.format(json.dumps(boxes, indent=1))) == [
        (0, "a [b]", (1.0, 2.0, 3.0, 4.0)),
        (0, "c", (5.0, 6.0, 7.0, 8.0)),
        (0, None, (5.0, 6.0, 7.0, 9.0)),
    ]


def test_text_around_boxes_is_preserved(folder: Path) -> None:
    text = 'In [1] and {2}: {"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 5]} [end'
    assert answer(folder, text) == [
        "In [1] and {2}: ",
        (0, None, (1.0, 2.0, 3.0, 4.0)),
        ", ",
        (0, None, (1.0, 2.0, 3.0, 5.0)),
        " [end",
    ]


@pytest.mark.parametrize(
    "text", ["x ^ { 2 }", '```json\n{"a": 1}\n```', '{"a": [1, 2, 3, 4]}', "["]
)
def test_text_without_boxes_is_unchanged(folder: Path, text: str) -> None:
    assert answer(folder, text) == [text]


@pytest.mark.parametrize("text", ["its bbox_2d {}", "{} bbox_2d: 1, 2", "{} bbox_2d {}"])
def test_malformed_boxes_are_rejected(folder: Path, text: str) -> None:
    box = '{"bbox_2d": [1, 2, 3, 4]}'
    with pytest.raises(UserError, match="outside of JSON"):
        answer(folder, text.replace("{}", box))


def test_empty_answer_has_no_parts(folder: Path) -> None:
    assert answer(folder, "") == []


def test_qwen2_vl_box_markup(folder: Path) -> None:
    dog = "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|>"
    text = f"{dog} and <|object_ref_start|>a woman<|object_ref_end|> play"
    expected = [(0, "a dog", pytest.approx((221, 211.5, 569, 443))), " and a woman play"]
    assert answer(folder, text) == expected


def test_box_markup_in_declared_pixels(folder: Path) -> None:
    text = "<|box_start|>(1,2),(30,14)<|box_end|>"
    scene = RowImages(ImportContext(ImageResolver(folder, folder / "out"), box_units="pixel"))
    scene.add_image("b.png")
    assert summarize_content(tuple(parse_answer(text, scene))) == [(0, None, (1, 2, 30, 14))]


def test_written_text_reads_back_the_same(folder: Path) -> None:
    box = BoxPart(xyxy=(1, 2.5, 3, 4), label='a "b"')
    content = (TextPart(text="In [1]: "), box, BoxPart(xyxy=(5, 6, 7, 8)), TextPart(text="!"))
    text = format_answer(content, 1)
    assert text == (
        'In [1]: [{"bbox_2d": [1, 2.5, 3, 4], "label": "a \\"b\\""}, {"bbox_2d": [5, 6, 7, 8]}]!'
    )
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
        ((ImagePart(image="a.png"),), 1),
    ],
)
def test_ambiguous_text_is_not_written(content: tuple[ContentPart, ...], images: int) -> None:
    with pytest.raises(UserError) as caught:
        format_answer(content, images)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize(("text", "what"), CASES["test_invalid_boxes_are_rejected"])
def test_invalid_boxes_are_rejected(folder: Path, text: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        answer(folder, text)
    assert caught.value.expected
    assert caught.value.remedy


def test_box_needs_exactly_one_image(folder: Path) -> None:
    with pytest.raises(UserError, match="2 images"):
        answer(folder, '{"bbox_2d": [1, 2, 3, 4]}', "a.png", "b.png")


def test_label_with_angle_bracket(folder: Path) -> None:
    text = "<|object_ref_start|>a<b<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    assert answer(folder, text) == [(0, "a<b", (1.0, 1.0, 3.0, 2.0))]
