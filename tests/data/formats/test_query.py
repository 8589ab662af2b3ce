"""Rows of query/response/image with `bbox_2d` in the response (the grounding tutorial)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign import read, talk

from finesight.data.formats import recognised
from finesight.data.formats.query import FORMAT
from finesight.errors import UserError

ASKED = "what is written? Examples of coordinate value formats: [x1,y1,x2,y2]"


def record(response: str, **more: Any) -> dict[str, Any]:
    return {"image": ["b.png"], "query": ASKED, "response": response, **more}


def answer(folder: Path, response: str, **said: Any) -> list[object]:
    return talk(read(FORMAT, record(response), folder, **said))[-1][1]


def test_corners_in_pixels(folder: Path) -> None:
    rows = record('{"bbox_2d": [467.0, 128.0, 521.0, 161.0]}')
    assert talk(read(FORMAT, rows, folder)) == [
        ("user", [folder / "b.png", ASKED]),
        ("assistant", [(0, None, (467.0, 128.0, 521.0, 161.0))]),
    ]
    form, reason = recognised([rows], "here")
    assert form is FORMAT
    assert "bbox_2d in 1" in reason


def test_declared_as_corner_and_size(folder: Path) -> None:
    response = '{"bbox_2d": [467.0, 128.0, 54.0, 33.0]}'
    assert answer(folder, response, box_format="xywh") == [(0, None, (467.0, 128.0, 521.0, 161.0))]
    with pytest.raises(UserError, match="reversed") as caught:
        answer(folder, response)
    assert "--box-format xywh" in caught.value.remedy


def test_declared_units(folder: Path) -> None:
    response = '{"bbox_2d": [100, 200, 300, 400]}'
    assert answer(folder, response, box_units="1000") == [
        (0, None, pytest.approx((100.0, 100.0, 300.0, 200.0)))
    ]


def test_no_box_is_an_answer_too(folder: Path) -> None:
    assert answer(folder, "A ghost.") == ["A ghost."]


def test_places_of_pictures(folder: Path) -> None:
    rows = {
        "images": ["a.png", "b.png"],
        "query": "<image>or <image>?",
        "response": "b",
        "system": "Be brief.",
    }
    assert talk(read(FORMAT, rows, folder))[:2] == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "or ", folder / "b.png", "?"]),
    ]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record('{"bbox_2d": [1, 2, 3, 4]}', image=["a.png", "b.png"]), "2 pictures"),
        (record('{"bbox_2d": [1, 2, 3, 4]}', image=None), "0 pictures"),
        (record("x", query="<image><image>"), "2 `<image>` in the texts for 1 pictures"),
        (record("x", query=None), "query is None"),
        (record("x", image=5), "a picture given as int"),
        (record("x", objects={"bbox": [[1, 2, 3, 4]]}), "the key 'objects'"),
        (record("x", history=[["q"]]), "history with"),
    ],
)
def test_refused(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read(FORMAT, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy
