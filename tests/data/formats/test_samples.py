"""The canonical form passes through an import, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign import read, talk

from finesight.data.formats import recognised
from finesight.data.formats.samples import FORMAT
from finesight.errors import UserError


def record(*answer: dict[str, Any], **more: Any) -> dict[str, Any]:
    pictures = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    return {
        "id": "7",
        "messages": [
            {"role": "user", "content": [*pictures, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": list(answer) or "yes"},
        ],
        **more,
    }


def test_everything_is_kept(folder: Path) -> None:
    rows = record(references=["yeah"], meta={"n": 1})
    case = read(FORMAT, rows, folder)
    assert talk(case) == [
        ("user", [folder / "a.png", folder / "b.png", "?"]),
        ("assistant", ["yes"]),
    ]
    (sample,) = case.for_training()
    assert sample == case.for_evaluation()
    assert (sample.id, sample.references, sample.meta) == ("7", ("yeah",), {"n": 1})
    assert recognised([rows], "here")[0] is FORMAT


def test_boxes_are_fitted_to_their_own_picture(folder: Path) -> None:
    box = {"type": "box", "image": 1, "xyxy": [900, 400, 1000.5, 500]}
    assert talk(read(FORMAT, record(box), folder))[1][1] == [(1, None, (900, 400, 1000, 500))]
    with pytest.raises(UserError, match="outside of its picture"):
        read(FORMAT, record({**box, "image": 0}), folder)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (record(answers=["x"]), "unknown key answers"),
        (record({"type": "box", "image": 2, "xyxy": [1, 2, 3, 4]}), "picture number 2"),
        (record({"type": "box", "xyxy": [3, 2, 1, 4]}), "the box"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no answer"),
        (record(messages=[{"role": "user", "content": "?"}] * 2), "roles are user, user"),
    ],
)
def test_refused(folder: Path, rows: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        read(FORMAT, rows, folder)
