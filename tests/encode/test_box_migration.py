"""Whole files from one family to another, in every shape that conversations have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_gray_image

from finesight.config import ExactSize, PixelRange
from finesight.encode.box_migration import MigrationResult, ResizeSpec, migrate_box_file
from finesight.errors import UserError

OLD = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(300,900)<|box_end|>"
NEW = '{"bbox_2d": [100, 200, 300, 900], "label": "dog"}'
PIXELS = '{"bbox_2d": [56, 56, 168, 252], "label": "dog"}'
# An image of 1000 x 500 pixels becomes 560 x 280.
RESIZING = ResizeSpec(PixelRange(min_pixels=3136, max_pixels=160000), 28)


def run_migration(
    folder: Path, content: str, source: str = "qwen2_vl", target: str = "qwen3_vl", **more: Any
) -> tuple[str, MigrationResult]:
    file = folder / "old.json"
    file.write_bytes(content.encode())
    (folder / "new.json").unlink(missing_ok=True)
    done = migrate_box_file(file, folder / "new.json", source, target, **more)
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
def test_every_conversation_layout(tmp_path: Path, shape: Any) -> None:
    text = json.dumps(shape)
    written, done = run_migration(tmp_path, text)
    assert json.loads(written) == json.loads(text.replace(json.dumps(OLD), json.dumps(NEW)))
    assert done.num_boxes == text.count("<|box_start|>")


def test_other_bytes_are_unchanged(tmp_path: Path) -> None:
    text = (
        '{ "id":1.50, "n" : 1e5, "n": NaN,\t"caption": "h\\u00fcndchen",\r\n'
        '  "response": "Ein H\\u00fcndchen %s", "query": "Hündchen\\/?\u2028"}\r\n'
    )
    written, _ = run_migration(tmp_path, text % OLD)
    assert written == text % json.dumps(NEW)[1:-1]


def test_json_lines_arrays_and_single_records(tmp_path: Path) -> None:
    record = {"query": "Where?\u2028", "response": OLD}
    line = json.dumps(record, ensure_ascii=False)
    expected = line.replace(json.dumps(OLD), json.dumps(NEW))
    for text, want, records in (
        (f"{line}\n\n{line}\n", f"{expected}\n\n{expected}\n", 2),
        (f"{line}\n{line}", f"{expected}\n{expected}", 2),
        (f"[{line},\n {line}]\n", f"[{expected},\n {expected}]\n", 2),
        (line, expected, 1),
    ):
        written, done = run_migration(tmp_path, text)
        assert written == want
        assert done.num_records == done.num_boxes == done.answers_with_boxes == records


def test_only_answers_are_rewritten(tmp_path: Path) -> None:
    rows = [
        {"query": f"What is {OLD}?", "response": "A dog."},
        {"query": "Where is it? Answer as JSON.", "response": OLD},
        {"query": "Where is it?", "response": OLD, "note": OLD},
        {"query": "Where is it?", "response": OLD},
    ]
    written, done = run_migration(tmp_path, "\n".join(map(json.dumps, rows)))
    assert written.count(json.dumps(OLD)[1:-1]) == 2
    assert done.unconverted == ("line 1", "line 2", "line 3")
    assert (done.num_boxes, done.answers_with_boxes, done.answers_without_boxes) == (3, 3, 1)


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
def test_pixels_refer_to_resized_image(tmp_path: Path, shown: dict[str, Any]) -> None:
    write_gray_image(tmp_path / "a.png", 1000, 500)
    there, _ = run_migration(
        tmp_path, json.dumps({**shown, "response": OLD}), target="qwen2_5_vl", resize_spec=RESIZING
    )
    assert json.loads(there)["response"] == PIXELS
    back, _ = run_migration(tmp_path, there, "qwen2_5_vl", "qwen2_vl", resize_spec=RESIZING)
    assert json.loads(back)["response"] == OLD


def test_exact_image_size(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 33, 77)
    text = json.dumps({"image": "a.png", "response": OLD})
    exact = ResizeSpec(ExactSize(height=280, width=560), 28)
    written, _ = run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=exact)
    assert json.loads(written)["response"] == PIXELS


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"response": OLD}], "a record of 0 images"),
        ([{"images": ["a.png", "b.png"], "response": OLD}], "a record of 2 images"),
        ([{"image": "missing.png", "response": OLD}], "no such image"),
        ([{"image": "a.png", "response": "<|box_start|>"}], "invalid box in"),
    ],
)
def test_boxes_without_unique_image_are_rejected(
    tmp_path: Path, rows: list[Any], what: str
) -> None:
    write_gray_image(tmp_path / "a.png", 1000, 500)
    write_gray_image(tmp_path / "b.png")
    good = {"image": "a.png", "response": OLD}
    text = "\n".join(map(json.dumps, [good, *rows]))
    with pytest.raises(UserError, match=what) as caught:
        run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=RESIZING)
    assert "line 2" in caught.value.what
    assert "1 answers cannot be converted" in caught.value.what
    assert not (tmp_path / "new.json").exists()


def test_record_without_boxes_needs_no_image(tmp_path: Path) -> None:
    text = json.dumps({"response": "A dog."})
    written, done = run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=RESIZING)
    assert written == text
    assert done.num_boxes == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"target": "qwen2_vl"}, "both families are qwen2_vl"),
        ({"target": "qwen4"}, "unknown family 'qwen4'"),
        ({"target": "qwen2_5_vl"}, "not given for qwen2_vl to qwen2_5_vl"),
        ({"resize_spec": RESIZING}, "given for qwen2_vl to qwen3_vl"),
    ],
)
def test_invalid_arguments_are_rejected(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        run_migration(tmp_path, "[]", **change)
    assert caught.value.remedy


def test_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    (tmp_path / "b.json").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="the file exists"):
        migrate_box_file(tmp_path / "a.json", tmp_path / "b.json", "qwen_vl", "qwen2_vl")
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == "mine"


def test_broken_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="invalid JSON") as caught:
        run_migration(tmp_path, '{"a": 1}\n{"a"\n')
    assert caught.value.where.endswith("old.json:2")
    with pytest.raises(UserError, match="no such file"):
        migrate_box_file(tmp_path / "x.json", tmp_path / "b.json", "qwen_vl", "qwen2_vl")


def test_unconverted_points_are_reported(tmp_path: Path) -> None:
    answer = '{"point_2d": [112, 140], "label": "dog"}'
    text = json.dumps({"image": "a.png", "response": answer})
    written, done = run_migration(tmp_path, text, "qwen2_5_vl", "qwen3_vl", resize_spec=RESIZING)
    assert written == text
    assert done.unconverted == ("the record",)
