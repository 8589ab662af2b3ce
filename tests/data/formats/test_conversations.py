"""Conversations of from/value with `<|vision_start|>path<|vision_end|>` (two of the tutorials)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record
from each_value import each

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import CONVERSATIONS
from finesight.errors import UserError

A = "<|vision_start|>a.png<|vision_end|>"


def record(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def test_prompt_of_file_is_preserved(folder: Path) -> None:
    rows = record(("user", f"COCO Yes: {A}"), ("assistant", "A dog."))
    case = parse_record(CONVERSATIONS, {"id": "identity_1", **rows}, folder)
    assert case.id == "identity_1"
    assert list_turns(case) == [
        ("user", ["COCO Yes: ", folder / "a.png"]),
        ("assistant", ["A dog."]),
    ]
    assert detect_format([rows], "here")[0] is CONVERSATIONS


def test_many_turns_with_interleaved_images(folder: Path) -> None:
    absolute = folder / "b.png"
    rows = record(
        (
            "human",
            f"<|vision_start|>a.png<|vision_end|>or <|vision_start|>{absolute}<|vision_end|>?",
        ),
        ("gpt", "The second."),
        ("user", f"And {A}now?"),
        ("assistant", "No."),
        system="Be brief.",
        licence="CC0",
        year=float("nan"),
    )
    case = parse_record(CONVERSATIONS, rows, folder)
    assert case.id == "rows-3"
    assert list_turns(case) == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "or ", absolute, "?"]),
        ("assistant", ["The second."]),
        ("user", ["And ", folder / "a.png", "now?"]),
        ("assistant", ["No."]),
    ]
    assert case.meta == {"licence": "CC0", "year": None}


def test_images_listed_separately(folder: Path) -> None:
    rows = record(("human", "<image>\nthen <image>"), ("gpt", "Two."), images=["a.png", "b.png"])
    assert list_turns(parse_record(CONVERSATIONS, rows, folder))[0] == (
        "user",
        [folder / "a.png", "\nthen ", folder / "b.png"],
    )


def test_conversation_without_image(folder: Path) -> None:
    rows = record(("user", "Hello"), ("assistant", "Hi"))
    assert list_turns(parse_record(CONVERSATIONS, rows, folder)) == [
        ("user", ["Hello"]),
        ("assistant", ["Hi"]),
    ]
    assert detect_format([rows], "here")[0] is CONVERSATIONS


def test_prompt_is_added_to_first_question_only(folder: Path) -> None:
    rows = record(("user", A), ("assistant", "x"), ("user", "y"), ("assistant", "z"))
    turns = list_turns(parse_record(CONVERSATIONS, rows, folder, prompt="What?"))
    assert turns[0] == ("user", [folder / "a.png", "What?"])
    assert turns[2] == ("user", ["y"])
    with pytest.raises(UserError, match="without text"):
        parse_record(CONVERSATIONS, rows, folder)


def test_json_boxes_in_answer(folder: Path) -> None:
    rows = record(
        ("human", "<image>\nLocate it, report bbox_2d as JSON."),
        ("gpt", 'There: {"bbox_2d": [10, 5, 20, 10], "label": "a dog"}'),
        image="a.png",
    )
    assert list_turns(parse_record(CONVERSATIONS, rows, folder)) == [
        ("user", [folder / "a.png", "\nLocate it, report bbox_2d as JSON."]),
        ("assistant", ["There: ", (0, "a dog", (10.0, 5.0, 20.0, 10.0))]),
    ]
    declared = parse_record(CONVERSATIONS, rows, folder, box_format="xywh")
    assert list_turns(declared)[1][1][1] == (0, "a dog", (10.0, 5.0, 30.0, 15.0))


def test_empty_turn_does_not_prevent_detection() -> None:
    empty = {"conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": None}]}
    assert detect_format([record(("user", "q"), ("gpt", "a")), empty], "here")[0] is CONVERSATIONS


@each(
    ("rows", "what"),
    [
        (
            record(("user", A.replace("a.png", "c.png") + "?"), ("gpt", "a")),
            "no such image",
        ),
        (record(("user", "q <image>"), ("gpt", "a")), "a placeholder without an image"),
        (record(("user", "q"), ("gpt", "a"), image="a.png"), "no `<image>` in the text"),
        (record(("user", "q <img>a.png</img>"), ("gpt", "a")), "the placeholder '<img>'"),
        (record(("user", "q <|image_pad|>"), ("gpt", "a")), "the placeholder"),
        (record(("user", "q <|vision_start|>a.png"), ("gpt", "a")), "the placeholder"),
        (record(("user", "q")), "without an answer"),
        (record(("boss", "q"), ("gpt", "a")), "the turn"),
        ({"conversations": [{"from": ["user"], "value": "q"}]}, "the turn"),
        (record(("user", " b.png"), ("gpt", "a")), "contains only a path, 'b.png'"),
        (record(("user", f"{A}{A}?"), ("gpt", '{"bbox_2d": [1, 2, 3, 4]}')), "2 images"),
        (record(("user", "q"), ("gpt", "a"), videos=["a.mp4"]), "1 videos are listed, 1 of them"),
        (record(("user", "<video>"), ("gpt", "a"), videos=["a.mp4"]), "no such image"),
        (record(("user", "<video>"), ("gpt", "a"), videos=[["a.png", 7]]), "an image given as int"),
        ({"conversations": []}, "conversations is"),
        ({"conversations": [{"from": "user", "value": 5}]}, "the turn"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_record(CONVERSATIONS, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy


def test_web_address_is_not_a_path(folder: Path) -> None:
    mark = "<|vision_start|>https://example.org/a.png<|vision_end|>"
    with pytest.raises(UserError, match="a web URL"):
        parse_record(CONVERSATIONS, record(("user", f"q {mark}"), ("gpt", "a")), folder)
