"""Boxes in texts and data files, from the format of one family to that of another."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from each_value import each
from image_fixtures import write_gray_image

from finesight.config import ExactSize, PixelRange
from finesight.data.image_header import ImageSize
from finesight.encode.box_migration import (
    MigrationResult,
    ResizeSpec,
    convert_boxes,
    migrate_box_file,
)
from finesight.errors import UserError

CASES = load_cases("box_migration")

THOUSAND = (1000, 1000)
COORDINATE = r"\b\d+\b"
RESIZED = (280, 560)
# The same box: from 10 % to 30 % of the width, from 20 % to 90 % of the height.
TEXTS = {
    "qwen_vl": "<ref>dog</ref><box>(100,200),(300,900)</box>",
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|>"
    "<|box_start|>(100,200),(300,900)<|box_end|>",
    "qwen2_5_vl": '{"bbox_2d": [56, 56, 168, 252], "label": "dog"}',
    "qwen3_vl": '{"bbox_2d": [100, 200, 300, 900], "label": "dog"}',
}
OLD, NEW, PIXELS = TEXTS["qwen2_vl"], TEXTS["qwen3_vl"], TEXTS["qwen2_5_vl"]
# An image of 1000 x 500 pixels becomes 560 x 280.
RESIZING = ResizeSpec(PixelRange(min_pixels=3136, max_pixels=160000), 28)


def convert(text: str, source: str, target: str, resized: ImageSize = RESIZED) -> tuple[str, int]:
    old, new = (resized if name == "qwen2_5_vl" else THOUSAND for name in (source, target))
    return convert_boxes(text, source, target, lambda: (old, new))


@each(("source", "target"), itertools.permutations(TEXTS, 2))
def test_conversion_between_all_families(source, target):
    converted = convert(f"Here: {TEXTS[source]}, you see.", source, target)
    assert converted == (f"Here: {TEXTS[target]}, you see.", 1)
    for text in ("", "A dog.", '{"a": [1, 2]}', "(1,2),(3,4)", "[", "x < y"):
        assert convert(text, source, target) == (text, 0)


@each(("source", "target"), itertools.permutations(TEXTS, 2))
@each("resized", [(56, 84), RESIZED, (2044, 3584)])
def test_roundtrip_changes_coordinates_by_at_most_one(source, target, resized):
    """One unit of the coarser of the two frames."""
    random.seed(f"{source} {target} {resized}")
    frame, other = (resized if name == "qwen2_5_vl" else THOUSAND for name in (source, target))
    limits = [max(1, size / 1000, 1000 / far) for size, far in zip(frame, other, strict=True)]
    sides = [side if source == "qwen_vl" else side + 1 for side in frame]
    for _ in range(200):
        (y1, y2), (x1, x2) = (sorted(random.choices(range(side), k=2)) for side in sides)
        text = re.sub(COORDINATE, "%d", TEXTS[source]) % (x1, y1, x2, y2)
        there, _ = convert(text, source, target, resized)
        back, _ = convert(there, target, source, resized)
        corners = map(int, re.findall(COORDINATE, back))
        for before, after, limit in zip((x1, y1, x2, y2), corners, limits[::-1] * 2, strict=True):
            assert abs(after - before) <= limit, f"{text} became {back}"


@each(("text", "source", "target", "converted"), CASES["test_labels_lists_and_text_around_boxes"])
def test_labels_lists_and_text_around_boxes(text, source, target, converted):
    assert convert(text, source, target)[0] == converted


@each(("text", "source", "target", "what"), CASES["test_invalid_boxes_are_rejected"])
def test_invalid_boxes_are_rejected(text, source, target, what):
    with pytest.raises(UserError, match=what) as caught:
        convert(text, source, target)
    assert caught.value.expected
    assert caught.value.remedy


def run_migration(
    folder: Path, content: str, source: str = "qwen2_vl", target: str = "qwen3_vl", **more: Any
) -> tuple[str, MigrationResult]:
    file = folder / "old.json"
    file.write_bytes(content.encode())
    (folder / "new.json").unlink(missing_ok=True)
    done = migrate_box_file(file, folder / "new.json", source, target, **more)
    return (folder / "new.json").read_bytes().decode(), done


@each("record", CASES["test_every_conversation_layout"])
def test_every_conversation_layout(tmp_path, record):
    text = json.dumps(record)
    written, done = run_migration(tmp_path, text)
    assert json.loads(written) == json.loads(text.replace(json.dumps(OLD), json.dumps(NEW)))
    assert done.num_boxes == text.count("<|box_start|>")


def test_other_bytes_of_all_file_layouts_are_unchanged(tmp_path):
    line = (
        '{ "id":1.50, "n" : 1e5, "n": NaN,\t"caption": "h\\u00fcndchen",\r\n'
        '  "response": "Ein H\\u00fcndchen %s", "query": "Hündchen\\/?\u2028"}\r\n'
    )
    written, _ = run_migration(tmp_path, line % OLD)
    assert written == line % json.dumps(NEW)[1:-1]
    record = json.dumps({"query": "Where?\u2028", "response": OLD}, ensure_ascii=False)
    expected = record.replace(json.dumps(OLD), json.dumps(NEW))
    for layout in ("{0}\n\n{0}\n", "{0}\n{0}", "[{0},\n {0}]\n", "{0}"):
        written, done = run_migration(tmp_path, layout.format(record))
        assert written == layout.format(expected)
        num_records = layout.count("{0}")
        assert done.num_records == done.num_boxes == done.answers_with_boxes == num_records


def test_only_answers_are_rewritten(tmp_path):
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


PART = {"type": "image_url", "image_url": {"url": "a.png"}}


@each("image", CASES["test_pixels_refer_to_resized_image"])
def test_pixels_refer_to_resized_image(tmp_path, image):
    write_gray_image(tmp_path / "a.png", 1000, 500)
    text = json.dumps({**image, "response": OLD})
    there, _ = run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=RESIZING)
    assert json.loads(there)["response"] == PIXELS
    back, _ = run_migration(tmp_path, there, "qwen2_5_vl", "qwen2_vl", resize_spec=RESIZING)
    assert json.loads(back)["response"] == OLD
    write_gray_image(tmp_path / "a.png", 33, 77)
    exact = ResizeSpec(ExactSize(height=280, width=560), 28)
    written, _ = run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=exact)
    assert json.loads(written)["response"] == PIXELS


@each(("row", "what"), CASES["test_boxes_without_unique_image_are_rejected"])
def test_boxes_without_unique_image_are_rejected(tmp_path, row, what):
    write_gray_image(tmp_path / "a.png", 1000, 500)
    write_gray_image(tmp_path / "b.png")
    rows = [{"image": "a.png", "response": OLD}, {"response": "A record without boxes."}, row]
    text = "\n".join(map(json.dumps, rows))
    with pytest.raises(UserError, match=what) as caught:
        run_migration(tmp_path, text, target="qwen2_5_vl", resize_spec=RESIZING)
    assert "line 3" in caught.value.what
    assert "1 answers cannot be converted" in caught.value.what
    assert not (tmp_path / "new.json").exists()


@each(
    ("content", "change", "message"),
    [
        ("[]", {"target": "qwen2_vl"}, "both families are qwen2_vl"),
        ("[]", {"target": "qwen2_5_vl"}, "not given for qwen2_vl to qwen2_5_vl"),
        ("[]", {"resize_spec": RESIZING}, "given for qwen2_vl to qwen3_vl"),
        ('{"a": 1}\n{"a"\n', {}, r"old.json:2: invalid JSON"),
    ],
)
def test_invalid_arguments_and_files_are_rejected(tmp_path, content, change, message):
    with pytest.raises(UserError, match=message) as caught:
        run_migration(tmp_path, content, **change)
    assert caught.value.remedy


def test_output_is_not_overwritten_and_input_must_exist(tmp_path):
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    (tmp_path / "b.json").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        migrate_box_file(tmp_path / "a.json", tmp_path / "b.json", "qwen_vl", "qwen2_vl")
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == "mine"
    with pytest.raises(UserError, match="no such file"):
        migrate_box_file(tmp_path / "x.json", tmp_path / "c.json", "qwen_vl", "qwen2_vl")
