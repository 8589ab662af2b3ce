"""ms-swift's datasets: boxes under `objects`, images under `images` (its "Custom Dataset")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record
from case_files import load_cases

from finesight.data.formats import detect_format
from finesight.data.formats.conversations import MS_SWIFT
from finesight.errors import UserError


def record(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["b.png"], **more}


FIND = record(
    "<image>Find the <ref-object> in the image",
    "<bbox><bbox>",
    objects={"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 499.8]]},
)
DESCRIBE = record(
    "<image>Describe the image.",
    "<ref-object><bbox> and <ref-object><bbox> are playing on the beach",
    objects={
        "ref": ["a dog", "a woman"],
        "bbox": [[331.5, 61.4, 853.5, 494.8], [676.5, 85.8, 999.5, 427.4]],
    },
)


def test_boxes_are_xyxy_pixels(folder: Path) -> None:
    assert list_turns(parse_record(MS_SWIFT, FIND, folder)) == [
        ("user", [folder / "b.png", "Find the sheep in the image"]),
        (
            "assistant",
            [(0, None, (90.9, 160.8, 135, 212.8)), (0, None, (360.9, 480.8, 495, 499.8))],
        ),
    ]
    form, reason = detect_format([FIND], "here")
    assert form is MS_SWIFT
    assert "objects in 1 of the first 1" in reason


def test_reference_before_box_is_its_label(folder: Path) -> None:
    assert list_turns(parse_record(MS_SWIFT, DESCRIBE, folder))[1][1] == [
        (0, "a dog", (331.5, 61.4, 853.5, 494.8)),
        " and ",
        (0, "a woman", (676.5, 85.8, 999.5, 427.4)),
        " are playing on the beach",
    ]


def test_normalized_boxes(folder: Path) -> None:
    objects = {"bbox": [[0.25, 0.5, 0.75, 1.0]], "bbox_type": "norm1"}
    rows = record("<image>Where?", "<bbox>", objects=objects)
    assert list_turns(parse_record(MS_SWIFT, rows, folder))[1][1] == [
        (0, None, (250, 250, 750, 500))
    ]


def test_image_id_of_box(folder: Path) -> None:
    objects = {"bbox": [[900, 400, 1000, 500], [0, 0, 40, 20]], "image_id": [1, 0]}
    rows = record("<image><image>?", "<bbox>, <bbox>", images=["a.png", "b.png"], objects=objects)
    assert list_turns(parse_record(MS_SWIFT, rows, folder))[1][1] == [
        (1, None, (900, 400, 1000, 500)),
        ", ",
        (0, None, (0, 0, 40, 20)),
    ]


def test_declared_box_format_has_priority(folder: Path) -> None:
    objects = {"bbox": [[100, 100, 50, 20]]}
    rows = record("<image>Where?", "<bbox>", objects=objects)
    answer = list_turns(parse_record(MS_SWIFT, rows, folder, box_format="xywh"))[1][1]
    assert answer == [(0, None, (100, 100, 150, 120))]
    with pytest.raises(UserError, match="inverted") as caught:
        parse_record(MS_SWIFT, rows, folder)
    assert "--box-format xywh" in caught.value.remedy


def test_model_markup_is_accepted(folder: Path) -> None:
    rows = record(
        "<image>Find the <|object_ref_start|>sheep<|object_ref_end|> in the image",
        "<|box_start|>(101,201),(150,266)<|box_end|><|box_start|>(401,601),(550,666)<|box_end|>",
    )
    question, answer = list_turns(parse_record(MS_SWIFT, rows, folder))
    assert question[1] == [folder / "b.png", "Find the sheep in the image"]
    assert answer[1] == [
        (0, None, pytest.approx((101, 100.5, 150, 133))),
        (0, None, pytest.approx((401, 300.5, 550, 333))),
    ]


@pytest.mark.parametrize("rows", load_cases("ms_swift_rows"))
def test_equivalent_row_layouts(folder: Path, rows: dict[str, Any]) -> None:
    assert list_turns(parse_record(MS_SWIFT, rows, folder)) == [
        ("system", ["Be brief."]),
        ("user", [folder / "a.png", "Which?"]),
        ("assistant", ["One."]),
        ("user", ["And now?"]),
        ("assistant", ["Two."]),
    ]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record("<image><image>?", "x"), "without an image: 1 image listed"),
        (record("<image>?", "<bbox>"), "a `<bbox>` without a box"),
        (record("<image>?", "<ref-object>"), "a `<ref-object>` for the reference None"),
        (record("<image>?", "x", objects={"bbox": [[1, 2, 3, 4]]}), "1 boxes under objects.bbox"),
        (record("<image>?", "<bbox>", objects={"bbox": [[615, 226]]}), "points"),
        (
            record("<image>?", "<bbox>", objects={"bbox": [[1, 2, 3, 4]], "image_id": [1]}),
            "image 1",
        ),
        (record("<image>?", "<bbox>", objects={"bbox": [], "image_id": [-1]}), "image_id"),
        (record("<image>?", "<bbox>", objects={"bbox": [], "bbox_type": "norm1000"}), "norm1000"),
        (record("<image>?", "<bbox>", objects=[{"caption": "x"}]), "objects"),
        (record("<image>?", "x", videos=["a.mp4"]), "no such image"),
        (record("<video><video>?", "x", videos=["a.mp4"]), "no such image"),
        (record("<image>?", "x", audios=["a.wav"]), "'audios'"),
        (record("<image>?", "x", label=False), "'label'"),
        ({"messages": [{"role": "tool_call", "content": "{}"}]}, "tool calls"),
        ({"messages": [{"role": "assistant", "content": "x", "loss": False}]}, "'loss'"),
        ({"text": "x"}, "a row with the keys text"),
        ({"conversation": [{"human": "x"}]}, "the turn"),
        ({"query": "x", "response": "y", "history": [["z"]]}, "history with"),
        ({"conversation": [{"human": "x", "assistant": "y", "value": "z"}]}, "the turn"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_record(MS_SWIFT, rows, folder)
    assert caught.value.expected
    assert caught.value.remedy


def test_rows_of_other_formats_are_not_detected(folder: Path) -> None:
    baseline = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    }
    assert detect_format([baseline], "here")[0].name == "samples"
    assert detect_format([{**baseline, "images": ["a.png"]}], "here")[0] is MS_SWIFT
    assert detect_format([{"query": "?", "response": "x"}], "here")[0].name == "query-response"
