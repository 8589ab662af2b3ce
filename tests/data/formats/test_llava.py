"""LLaVA's datasets (its "Finetune LLaVA on Custom Datasets")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import LLAVA
from finesight.errors import UserError


def record(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "997bb945", "image": "a.png", "conversations": turns, **more}


def test_line_break_after_image_is_removed(folder: Path) -> None:
    rows = record("<image>\nWrite a prompt to generate this image.", "a beautiful painting")
    case = parse_record(LLAVA, rows, folder)
    assert case.id == "997bb945"
    assert list_turns(case) == [
        ("user", [folder / "a.png", "Write a prompt to generate this image."]),
        ("assistant", ["a beautiful painting"]),
    ]
    form, reason = detect_format([rows, record("No image?", "None.", image=None)], "here")
    assert form is LLAVA
    assert "image in 1 of the first 2" in reason


def test_image_after_question(folder: Path) -> None:
    rows = record("What is this?\n<image>", "x")
    assert list_turns(parse_record(LLAVA, rows, folder))[0][1] == [
        "What is this?\n",
        folder / "a.png",
    ]


def test_boxes_in_answer(folder: Path) -> None:
    rows = record("<image>\nWhere?", 'There: {"bbox_2d": [1, 2, 30, 14]}.')
    assert list_turns(parse_record(LLAVA, rows, folder))[1][1] == [
        "There: ",
        (0, None, (1, 2, 30, 14)),
        ".",
    ]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record("<image><image>?", "x"), "a placeholder without an image"),
        (record("What?", "x"), "1 images are listed, 1 of them have no `<image>`"),
        (record("<image>?", "x", video="a.mp4"), "1 videos are listed"),
        (record("<image>?", "x", audio="a.wav"), "'audio'"),
        ({"conversations": None, "image": "a.png"}, "conversations is"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "tool calls"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_record(LLAVA, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy


def test_list_of_images(folder: Path) -> None:
    rows = record("<image>\n<image>\nWhich is larger?", "The second.", image=["a.png", "b.png"])
    assert detect_format([rows], "here")[0] is LLAVA
    shown = [folder / "a.png", folder / "b.png", "Which is larger?"]
    assert list_turns(parse_record(LLAVA, rows, folder))[0][1] == shown
