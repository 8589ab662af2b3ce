"""Rows of query/response/image with `bbox_2d` in the response (the grounding tutorial)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import QUERY_RESPONSE
from finesight.errors import UserError

QUERY = "what is written? Examples of coordinate value formats: [x1,y1,x2,y2]"


def record(response: str, **more: Any) -> dict[str, Any]:
    return {"image": ["b.png"], "query": QUERY, "response": response, **more}


def answer(folder: Path, response: str, **output: Any) -> list[object]:
    return list_turns(parse_record(QUERY_RESPONSE, record(response), folder, **output))[-1][1]


def test_corners_in_pixels(folder: Path) -> None:
    rows = record('{"bbox_2d": [467.0, 128.0, 521.0, 161.0]}')
    assert list_turns(parse_record(QUERY_RESPONSE, rows, folder)) == [
        ("user", [folder / "b.png", QUERY]),
        ("assistant", [(0, None, (467.0, 128.0, 521.0, 161.0))]),
    ]
    form, reason = detect_format([rows], "here")
    assert form is QUERY_RESPONSE
    assert "bbox_2d in 1" in reason


def test_declared_xywh(folder: Path) -> None:
    response = '{"bbox_2d": [467.0, 128.0, 54.0, 33.0]}'
    assert answer(folder, response, box_format="xywh") == [(0, None, (467.0, 128.0, 521.0, 161.0))]
    with pytest.raises(UserError, match="inverted") as caught:
        answer(folder, response)
    assert "--box-format xywh" in caught.value.remedy


def test_declared_units(folder: Path) -> None:
    response = '{"bbox_2d": [100, 200, 300, 400]}'
    assert answer(folder, response, box_units="1000") == [
        (0, None, pytest.approx((100.0, 100.0, 300.0, 200.0)))
    ]


def test_answer_without_box(folder: Path) -> None:
    assert answer(folder, "A ghost.") == ["A ghost."]


def test_image_placeholders(folder: Path) -> None:
    rows = {
        "images": ["a.png", "b.png"],
        "query": "<image>or <image>?",
        "response": "b",
        "system": "Be brief.",
    }
    assert list_turns(parse_record(QUERY_RESPONSE, rows, folder))[:2] == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "or ", folder / "b.png", "?"]),
    ]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record('{"bbox_2d": [1, 2, 3, 4]}', image=["a.png", "b.png"]), "2 images"),
        (record('{"bbox_2d": [1, 2, 3, 4]}', image=None), "0 images"),
        (record("x", query="<image><image>"), "without an image: 1 image listed"),
        (record("x", query=None), "query is None"),
        (record("x", image=5), "an image given as int"),
        (record("x", objects={"bbox": [[1, 2, 3, 4]]}), "1 boxes under objects.bbox have no"),
        (record("x", history=[["q"]]), "history with"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_record(QUERY_RESPONSE, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy
