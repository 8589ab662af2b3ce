"""Chat messages with images as parts (OpenAI's guide "Vision fine-tuning", and TRL's form)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record
from each_value import each

from finesight.data.formats import detect_format
from finesight.data.formats.message_parts import OPENAI as FORMAT
from finesight.errors import UserError


def image_part(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def record(*content: object, answer: object = "Danbo", **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": list(content)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **more}


def test_example_of_openai_guide(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    data = (folder / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    rows = {
        "messages": [
            {"role": "developer", "content": "You identify uncommon cheeses."},
            {"role": "user", "content": "What is this cheese?"},
            {"role": "user", "content": [image_part({"url": url, "detail": "high"})]},
            {"role": "assistant", "content": "Danbo", "weight": 1},
        ]
    }
    saved = folder / "out" / "images" / "000001.png"
    assert list_turns(parse_record(FORMAT, rows, folder)) == [
        ("system", ["You identify uncommon cheeses."]),
        ("user", ["What is this cheese?", saved]),
        ("assistant", ["Danbo"]),
    ]
    assert saved.read_bytes() == data
    form, reason = detect_format([rows], "here")
    assert form is FORMAT
    assert "1 parts of type image_url" in reason


@pytest.mark.parametrize(
    "part",
    [
        image_part({"url": "a.png"}),
        image_part("a.png"),
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
    ],
)
def test_path_instead_of_url(folder: Path, part: dict[str, Any]) -> None:
    rows = record(text_part("What "), part, text_part(" is it?"))
    assert list_turns(parse_record(FORMAT, rows, folder))[0][1] == [
        "What ",
        folder / "a.png",
        " is it?",
    ]


def test_images_listed_separately(folder: Path) -> None:
    rows = record({"type": "image"}, {"type": "image"}, text_part("?"), images=["a.png", "b.png"])
    assert list_turns(parse_record(FORMAT, rows, folder))[0][1] == [
        folder / "a.png",
        folder / "b.png",
        "?",
    ]
    assert detect_format([rows], "here")[0] is FORMAT


def test_consecutive_texts_are_joined(folder: Path) -> None:
    rows = record(image_part("a.png"), text_part("What?"))
    rows["messages"].insert(1, {"role": "user", "content": "Be brief."})
    assert list_turns(parse_record(FORMAT, rows, folder))[0][1] == [
        folder / "a.png",
        "What?\nBe brief.",
    ]


def test_boxes_in_answer(folder: Path) -> None:
    rows = record(
        image_part("a.png"), text_part("?"), answer='{"bbox_2d": [1, 2, 30, 14], "label": "x"}'
    )
    assert list_turns(parse_record(FORMAT, rows, folder))[1][1] == [(0, "x", (1, 2, 30, 14))]


def test_metadata_is_preserved(folder: Path) -> None:
    case = parse_record(
        FORMAT, record(image_part("a.png"), text_part("?"), id="7", source="book"), folder
    )
    assert (case.id, case.meta) == ("7", {"source": "book"})


@each(
    ("rows", "what"),
    [
        (record(image_part({"url": "https://example.com/a.png"})), "a web URL"),
        (record(image_part({"url": "data:image/png;base64,???"}), text_part("?")), "the data URL"),
        (record(image_part({"url": "data:image/png,text"}), text_part("?")), "the data URL"),
        (record(image_part({"url": "data:;base64,dGV4dA=="}), text_part("?")), "not an image"),
        (record(image_part({"detail": "low"}), text_part("?")), "an image given as"),
        (record({"type": "image"}, text_part("?")), "without an image: 0 images listed"),
        (
            record({"type": "image"}, text_part("?"), images=["a.png", "b.png"]),
            "1 of them have no `<image>`",
        ),
        (record({"type": "input_audio"}), "the part"),
        (record(text_part("What is <image>?")), "the placeholder '<image>'"),
        (record(image_part("a.png"), text_part("?"), answer=None), "the part"),
        (record(image_part("a.png"), text_part("?"), tools=[{"type": "function"}]), "'tools'"),
        (record(image_part("a.png")), "a question without text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool calls"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "'weight'"),
        ({"messages": [{"role": "assistant", "tool_calls": [1], "content": ""}]}, "'tool_calls'"),
        ({"messages": "x"}, "messages is 'x'"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    (folder / "out").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=what) as caught:
        parse_record(FORMAT, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy


def test_system_prompt_outside_messages(folder: Path) -> None:
    case = parse_record(
        FORMAT, record(text_part("Cheese?"), image_part("a.png"), system="Be brief."), folder
    )
    assert list_turns(case)[0] == ("system", ["Be brief."])
    assert case.meta == {}
