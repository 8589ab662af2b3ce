"""Chat messages with pictures as parts (OpenAI's guide "Vision fine-tuning", and TRL's form)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from foreign import read, talk

from finesight.data.formats import recognised
from finesight.data.formats.openai import FORMAT
from finesight.errors import UserError


def shown(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def record(*content: object, answer: object = "Danbo", **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": list(content)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **more}


def test_the_example_of_the_guide(folder: Path) -> None:
    (folder / "out").mkdir()
    data = (folder / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    rows = {
        "messages": [
            {"role": "developer", "content": "You identify uncommon cheeses."},
            {"role": "user", "content": "What is this cheese?"},
            {"role": "user", "content": [shown({"url": url, "detail": "high"})]},
            {"role": "assistant", "content": "Danbo", "weight": 1},
        ]
    }
    saved = folder / "out" / "pictures" / "000001.png"
    assert talk(read(FORMAT, rows, folder)) == [
        ("system", ["You identify uncommon cheeses."]),
        ("user", ["What is this cheese?", saved]),
        ("assistant", ["Danbo"]),
    ]
    assert saved.read_bytes() == data
    form, reason = recognised([rows], "here")
    assert form is FORMAT
    assert "1 parts of type image_url" in reason


@pytest.mark.parametrize(
    "part",
    [
        shown({"url": "a.png"}),
        shown("a.png"),
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
    ],
)
def test_a_path_in_place_of_the_url(folder: Path, part: dict[str, Any]) -> None:
    rows = record(said("What "), part, said(" is it?"))
    assert talk(read(FORMAT, rows, folder))[0][1] == ["What ", folder / "a.png", " is it?"]


def test_pictures_beside_the_messages(folder: Path) -> None:
    rows = record({"type": "image"}, {"type": "image"}, said("?"), images=["a.png", "b.png"])
    assert talk(read(FORMAT, rows, folder))[0][1] == [folder / "a.png", folder / "b.png", "?"]
    assert recognised([rows], "here")[0] is FORMAT


def test_two_texts_of_one_speaker_are_lines(folder: Path) -> None:
    rows = record(shown("a.png"), said("What?"))
    rows["messages"].insert(1, {"role": "user", "content": "Be brief."})
    assert talk(read(FORMAT, rows, folder))[0][1] == [folder / "a.png", "What?\nBe brief."]


def test_boxes_in_the_answer(folder: Path) -> None:
    rows = record(shown("a.png"), said("?"), answer='{"bbox_2d": [1, 2, 30, 14], "label": "x"}')
    assert talk(read(FORMAT, rows, folder))[1][1] == [(0, "x", (1, 2, 30, 14))]


def test_notes_are_kept(folder: Path) -> None:
    case = read(FORMAT, record(shown("a.png"), said("?"), id="7", source="book"), folder)
    assert (case.id, case.meta) == ("7", {"source": "book"})


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record(shown({"url": "https://example.com/a.png"})), "an address on the web"),
        (record(shown({"url": "data:image/png;base64,???"}), said("?")), "the data URL"),
        (record(shown({"url": "data:image/png,text"}), said("?")), "the data URL"),
        (record(shown({"url": "data:;base64,dGV4dA=="}), said("?")), "not a picture"),
        (record(shown({"detail": "low"}), said("?")), "a picture given as"),
        (record({"type": "image"}, said("?")), "a picture given as NoneType"),
        (record({"type": "image"}, said("?"), images=["a.png", "b.png"]), "stand in no message"),
        (record({"type": "input_audio"}), "the part"),
        (record(said("What is <image>?")), "the mark '<image>'"),
        (record(shown("a.png"), said("?"), answer=None), "the part"),
        (record(shown("a.png"), said("?"), tools=[{"type": "function"}]), "'tools'"),
        (record(shown("a.png")), "a question without words"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the message"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "'weight'"),
        ({"messages": [{"role": "assistant", "tool_calls": [1], "content": ""}]}, "'tool_calls'"),
        ({"messages": "x"}, "messages is 'x'"),
    ],
)
def test_refused(folder: Path, rows: dict[str, Any], what: str) -> None:
    (folder / "out").mkdir()
    with pytest.raises(UserError, match=what) as caught:
        read(FORMAT, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy


def test_a_system_prompt_beside_the_messages(folder: Path) -> None:
    case = read(FORMAT, record(said("Cheese?"), shown("a.png"), system="Be brief."), folder)
    assert talk(case)[0] == ("system", ["Be brief."])
    assert case.meta == {}
