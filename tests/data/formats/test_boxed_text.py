"""Boxes as JSON in the text of an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign import brief

from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import Reading, Scene
from finesight.data.pictures import Pictures
from finesight.errors import UserError


def answer(folder: Path, text: str, *pictures: str) -> list[object]:
    """What is read of an answer about a picture of 1000 x 500 pixels, or about others."""
    scene = Scene(Reading(Pictures(folder, folder / "out")))
    for picture in pictures or ("b.png",):
        scene.picture(picture)
    return brief(tuple(answer_parts(text, scene)))


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "```\n{}```"])
def test_lists_and_fences(folder: Path, fence: str) -> None:
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


def test_text_around_is_kept(folder: Path) -> None:
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
def test_other_text_stays_as_it_is(folder: Path, text: str) -> None:
    assert answer(folder, text) == [text]


def test_nothing_is_no_part(folder: Path) -> None:
    assert answer(folder, "") == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"bbox_2d": [1, 2, 3]}', r"the box '\[1, 2, 3\]'"),
        ('{"bbox_2d": [1, 2, 3, 4], "score": 1}', "the box"),
        ('{"found": {"bbox_2d": [1, 2, 3, 4]}}', "the box"),
        ('{"bbox_2d": [1, 2, 3, 4]', "bbox_2d outside of JSON"),
        ('{"bbox_2d": [0, 0, 1005, 4]}', "outside of its picture"),
        ('{"bbox_2d": [0, 0, 5, 4]} <image>', "the mark '<image>'"),
    ],
)
def test_refused(folder: Path, text: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        answer(folder, text)
    assert caught.value.expected
    assert caught.value.remedy


def test_one_picture_is_needed_to_know_whose_the_box_is(folder: Path) -> None:
    with pytest.raises(UserError, match="2 pictures"):
        answer(folder, '{"bbox_2d": [1, 2, 3, 4]}', "a.png", "b.png")
