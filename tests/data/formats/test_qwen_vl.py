"""The first Qwen-VL's conversations: `<img>`, `<ref>` and `<box>` on a grid of 1000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import QWEN_VL as FORMAT
from finesight.errors import UserError


def record(*texts: str) -> dict[str, Any]:
    speakers = ("user", "assistant")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns}


NO_IMAGE = record("Hello", "I am Qwen-VL.")
BOXED = record(
    "Picture 1: <img>b.png</img>\nWhat breed is the dog?",
    "A labrador.",
    "Frame the shirt",
    "<ref>the shirt</ref><box>(588,499),(725,789)</box>",
)
SEVERAL = record(
    "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nWhich is which?", "Guess."
)


def test_boxes_become_original_pixels(folder: Path) -> None:
    turns = list_turns(parse_record(FORMAT, BOXED, folder))
    assert turns[0] == ("user", [folder / "b.png", "What breed is the dog?"])
    ((image, label, corners),) = turns[3][1]
    assert (image, label) == (0, "the shirt")
    assert corners == pytest.approx((588.0, 249.5, 725.0, 394.5))


def test_several_images(folder: Path) -> None:
    assert list_turns(parse_record(FORMAT, SEVERAL, folder))[0] == (
        "user",
        [folder / "a.png", folder / "b.png", "Which is which?"],
    )


def test_box_belongs_to_preceding_image(folder: Path) -> None:
    rows = record(
        "Picture 1: <img>a.png</img>\nDog?",
        "<box>(0,0),(500,500)</box>",
        "Picture 2: <img>b.png</img>\nNot <ref>the cat</ref> at <box>(1,2),(3,4)</box>?",
        "See <ref>dogs</ref><box>(0,0),(500,500)</box><box>(10, 20), (30, 40)</box>!",
    )
    turns = list_turns(parse_record(FORMAT, rows, folder))
    assert turns[1] == ("assistant", [(0, None, (0.0, 0.0, 20.0, 10.0))])
    assert turns[2][1] == [
        folder / "b.png",
        "Not the cat at ",
        (1, None, pytest.approx((1.0, 1.0, 3.0, 2.0))),
        "?",
    ]
    assert turns[3][1] == [
        "See ",
        (1, "dogs", (0.0, 0.0, 500.0, 250.0)),
        (1, "dogs", pytest.approx((10.0, 10.0, 30.0, 20.0))),
        "!",
    ]


def test_declared_units_override_the_grid(folder: Path) -> None:
    rows = record("<img>a.png</img>Dog?", "<box>(1,2),(3,4)</box>")
    case = parse_record(FORMAT, rows, folder, box_format="xywh", box_units="pixel")
    assert list_turns(case)[1] == ("assistant", [(0, None, (1.0, 2.0, 4.0, 6.0))])


def test_detected_by_markup_of_later_row() -> None:
    form, reason = detect_format([NO_IMAGE, BOXED, SEVERAL], "here")
    assert form is FORMAT
    assert "Picture 1: <img>b.png</img>" in reason


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record("Dog?", "<box>(1,2),(3,4)</box>"), "precedes the first image"),
        (record("<img>a.png</img>Dog?", "<box>(9,2),(3,4)</box>"), "inverted"),
        (record("<img>a.png</img>Dog?", "<box>(9,2)</box>"), "points"),
        (
            record("<img>a.png</img>Dog?", "<quad>(1,2),(3,4),(5,6)</quad>"),
            "the placeholder '<quad>",
        ),
        ({"image": "a.png", **record("<ref>Dog</ref>?", "Yes")}, "the key 'image' with a.png"),
        (record("<img>c.png</img>Dog?", "Yes"), "no such image"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_record(FORMAT, rows, folder)


def test_label_with_angle_bracket(folder: Path) -> None:
    rows = record("<img>b.png</img>Frame <ref>a<b</ref>", "<ref>a<b</ref><box>(1,2),(3,4)</box>")
    case = parse_record(FORMAT, rows, folder, box_units="pixel")
    assert list_turns(case) == [
        ("user", [folder / "b.png", "Frame a<b"]),
        ("assistant", [(0, "a<b", (1.0, 2.0, 3.0, 4.0))]),
    ]
