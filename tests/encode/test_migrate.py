"""Whole files from one family to another, in every shape that conversations have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scenery import paint

from finesight.config import ExactSize, PixelRange
from finesight.encode.migrate import Migrated, Resizing, migrate_file
from finesight.errors import UserError

OLD = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(300,900)<|box_end|>"
NEW = '{"bbox_2d": [100, 200, 300, 900], "label": "dog"}'
PIXELS = '{"bbox_2d": [56, 56, 168, 252], "label": "dog"}'
# A picture of 1000 x 500 pixels becomes 560 x 280.
RESIZING = Resizing(PixelRange(min_pixels=3136, max_pixels=160000), 28)


def migrated(
    folder: Path, content: str, source: str = "qwen2_vl", target: str = "qwen3_vl", **more: Any
) -> tuple[str, Migrated]:
    file = folder / "old.json"
    file.write_bytes(content.encode())
    (folder / "new.json").unlink(missing_ok=True)
    done = migrate_file(file, folder / "new.json", source, target, **more)
    return (folder / "new.json").read_bytes().decode(), done


SHAPES: list[Any] = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": OLD}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": OLD}]},
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": OLD}]}]},
    {"query": "q", "response": OLD, "history": [["q", OLD], ["q", "none"]]},
    {"instruction": "q", "input": "", "output": OLD},
    {"conversation": [{"human": "q", "assistant": OLD}]},
    {"history": [{"role": "assistant", "content": OLD}], "rejected_response": OLD},
    {"id": "identity_0", "extra": {"response": OLD}},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path: Path, shape: Any) -> None:
    text = json.dumps(shape)
    written, done = migrated(tmp_path, text)
    assert json.loads(written) == json.loads(text.replace(json.dumps(OLD), json.dumps(NEW)))
    assert done.boxes == text.count("<|box_start|>")


def test_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    text = (
        '{ "id":1.50, "n" : 1e5, "n": NaN,\t"caption": "h\\u00fcndchen",\r\n'
        '  "response": "Ein H\\u00fcndchen %s", "query": "Hündchen\\/?\u2028"}\r\n'
    )
    written, _ = migrated(tmp_path, text % OLD)
    assert written == text % json.dumps(NEW)[1:-1]


def test_lines_arrays_and_one_record(tmp_path: Path) -> None:
    record = {"query": "Where?\u2028", "response": OLD}
    line = json.dumps(record, ensure_ascii=False)
    expected = line.replace(json.dumps(OLD), json.dumps(NEW))
    for text, want, records in (
        (f"{line}\n\n{line}\n", f"{expected}\n\n{expected}\n", 2),
        (f"{line}\n{line}", f"{expected}\n{expected}", 2),
        (f"[{line},\n {line}]\n", f"[{expected},\n {expected}]\n", 2),
        (line, expected, 1),
    ):
        written, done = migrated(tmp_path, text)
        assert written == want
        assert done.records == done.boxes == done.answers_with_boxes == records


def test_only_answers_are_rewritten_and_others_are_told(tmp_path: Path) -> None:
    rows = [
        {"query": f"What is {OLD}?", "response": "A dog."},
        {"query": "Where is it? Answer as JSON.", "response": OLD},
        {"query": "Where is it?", "response": OLD, "note": OLD},
        {"query": "Where is it?", "response": OLD},
    ]
    written, done = migrated(tmp_path, "\n".join(map(json.dumps, rows)))
    assert written.count(json.dumps(OLD)[1:-1]) == 2
    assert done.left == ("line 1", "line 2", "line 3")
    assert (done.boxes, done.answers_with_boxes, done.answers_without) == (3, 3, 1)


@pytest.mark.parametrize(
    "shown",
    [
        {"image": "a.png"},
        {"images": ["a.png"]},
        {"images": [{"path": "a.png"}]},
        {"conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhere?"}]},
        {"query": "<|vision_start|>a.png<|vision_end|>Where?"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "a.png"}}] * 2,
                }
            ]
        },
    ],
)
def test_pixels_are_those_of_the_resized_picture(tmp_path: Path, shown: dict[str, Any]) -> None:
    paint(tmp_path / "a.png", 1000, 500)
    there, _ = migrated(
        tmp_path, json.dumps({**shown, "response": OLD}), target="qwen2_5_vl", resizing=RESIZING
    )
    assert json.loads(there)["response"] == PIXELS
    back, _ = migrated(tmp_path, there, "qwen2_5_vl", "qwen2_vl", resizing=RESIZING)
    assert json.loads(back)["response"] == OLD


def test_an_exact_size(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 33, 77)
    text = json.dumps({"image": "a.png", "response": OLD})
    exact = Resizing(ExactSize(height=280, width=560), 28)
    written, _ = migrated(tmp_path, text, target="qwen2_5_vl", resizing=exact)
    assert json.loads(written)["response"] == PIXELS


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"response": OLD}], "a record of 0 pictures"),
        ([{"images": ["a.png", "b.png"], "response": OLD}], "a record of 2 pictures"),
        ([{"image": "missing.png", "response": OLD}], "no such picture"),
        ([{"image": "a.png", "response": "<|box_start|>"}], "cannot be read"),
    ],
)
def test_boxes_that_cannot_be_placed(tmp_path: Path, rows: list[Any], what: str) -> None:
    paint(tmp_path / "a.png", 1000, 500)
    paint(tmp_path / "b.png")
    good = {"image": "a.png", "response": OLD}
    text = "\n".join(map(json.dumps, [good, *rows]))
    with pytest.raises(UserError, match=what) as caught:
        migrated(tmp_path, text, target="qwen2_5_vl", resizing=RESIZING)
    assert "line 2" in caught.value.what
    assert "1 answers cannot be migrated" in caught.value.what
    assert not (tmp_path / "new.json").exists()


def test_a_record_without_boxes_needs_no_picture(tmp_path: Path) -> None:
    text = json.dumps({"response": "A dog."})
    written, done = migrated(tmp_path, text, target="qwen2_5_vl", resizing=RESIZING)
    assert written == text
    assert done.boxes == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"target": "qwen2_vl"}, "both families are qwen2_vl"),
        ({"target": "qwen4"}, "unknown family 'qwen4'"),
        ({"target": "qwen2_5_vl"}, "not given for qwen2_vl to qwen2_5_vl"),
        ({"resizing": RESIZING}, "given for qwen2_vl to qwen3_vl"),
    ],
)
def test_wishes_that_do_not_fit(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        migrated(tmp_path, "[]", **change)
    assert caught.value.remedy


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    (tmp_path / "b.json").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        migrate_file(tmp_path / "a.json", tmp_path / "b.json", "qwen_vl", "qwen2_vl")
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == "mine"


def test_broken_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="broken JSON") as caught:
        migrated(tmp_path, '{"a": 1}\n{"a"\n')
    assert caught.value.where.endswith("old.json:2")
    with pytest.raises(UserError, match="no such file"):
        migrate_file(tmp_path / "x.json", tmp_path / "b.json", "qwen_vl", "qwen2_vl")


def test_points_are_told_as_they_stay_in_the_old_frame(tmp_path: Path) -> None:
    answer = '{"point_2d": [112, 140], "label": "dog"}'
    text = json.dumps({"image": "a.png", "response": answer})
    written, done = migrated(tmp_path, text, "qwen2_5_vl", "qwen3_vl", resizing=RESIZING)
    assert written == text
    assert done.left == ("the record",)
