"""The canonical form passes through an import, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record

from finesight.data.formats import detect_format
from finesight.data.formats.message_parts import SAMPLES as FORMAT
from finesight.errors import UserError


def record(*answer: dict[str, Any], **more: Any) -> dict[str, Any]:
    images = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    return {
        "id": "7",
        "messages": [
            {"role": "user", "content": [*images, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": list(answer) or "yes"},
        ],
        **more,
    }


def test_all_fields_are_preserved(folder: Path) -> None:
    rows = record(references=["yeah"], meta={"n": 1})
    case = parse_record(FORMAT, rows, folder)
    assert list_turns(case) == [
        ("user", [folder / "a.png", folder / "b.png", "?"]),
        ("assistant", ["yes"]),
    ]
    (sample,) = case.to_train_samples()
    assert sample == case.to_eval_sample()
    assert (sample.id, sample.references, sample.meta) == ("7", ("yeah",), {"n": 1})
    assert detect_format([rows], "here")[0] is FORMAT


def test_boxes_are_clipped_to_their_image(folder: Path) -> None:
    box = {"type": "box", "image": 1, "xyxy": [900, 400, 1000.5, 500]}
    assert list_turns(parse_record(FORMAT, record(box), folder))[1][1] == [
        (1, None, (900, 400, 1000, 500))
    ]
    with pytest.raises(UserError, match="outside its image"):
        parse_record(FORMAT, record({**box, "image": 0}), folder)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record(answers=["x"]), "unknown key answers"),
        (record({"type": "box", "image": 2, "xyxy": [1, 2, 3, 4]}), "image 2"),
        (record({"type": "box", "xyxy": [3, 2, 1, 4]}), "the box"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no answer"),
        (record(messages=[{"role": "user", "content": "?"}] * 2), "roles are user, user"),
    ],
)
def test_invalid_rows_are_rejected(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_record(FORMAT, rows, folder)
