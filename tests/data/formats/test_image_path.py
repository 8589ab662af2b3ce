"""Conversations of role/value where the user's value is a path (the LaTeX tutorial)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import IMAGE_PATH
from finesight.errors import UserError


def record(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"role": role, "value": text} for role, text in turns]}


ROWS = record(("user", "a.png"), ("assistant", "x ^ { 2 } < y"))


def test_path_and_prompt(folder: Path) -> None:
    assert list_turns(parse_record(IMAGE_PATH, ROWS, folder, prompt="转换成LaTex公式。")) == [
        ("user", [folder / "a.png", "转换成LaTex公式。"]),
        ("assistant", ["x ^ { 2 } < y"]),
    ]
    assert detect_format([ROWS], "here")[0] is IMAGE_PATH


def test_json_boxes_in_answer(folder: Path) -> None:
    rows = record(("user", "a.png"), ("assistant", '{"bbox_2d": [1, 2, 3, 4]}'))
    turns = list_turns(parse_record(IMAGE_PATH, rows, folder, prompt="Where?"))
    assert turns[1] == ("assistant", [(0, None, (1.0, 2.0, 3.0, 4.0))])


def test_prompt_is_required(folder: Path) -> None:
    with pytest.raises(UserError, match="without text") as caught:
        parse_record(IMAGE_PATH, ROWS, folder)
    assert "--prompt" in caught.value.remedy
    assert list_turns(parse_record(IMAGE_PATH, ROWS, folder, prompt=""))[0] == (
        "user",
        [folder / "a.png"],
    )


def test_later_turns_are_text_unless_a_path(folder: Path) -> None:
    rows = record(("user", "a.png"), ("assistant", "x"), ("user", "sure?"), ("assistant", "yes"))
    turns = list_turns(parse_record(IMAGE_PATH, rows, folder, prompt="Read."))
    assert turns[2:] == [("user", ["sure?"]), ("assistant", ["yes"])]
    rows = record(("user", "a.png"), ("assistant", "x"), ("user", "b.png"), ("assistant", "y"))
    assert list_turns(parse_record(IMAGE_PATH, rows, folder, prompt="Read."))[2] == (
        "user",
        [folder / "b.png"],
    )


def test_sentence_is_not_taken_for_a_path() -> None:
    rows = record(("user", "Tell me about dogs"), ("assistant", "They bark."))
    assert detect_format([ROWS, rows], "here")[0] is not IMAGE_PATH
