"""Boxes in text, from each family's convention to each other's."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from case_files import load_cases
from each_value import each

from finesight.data.image_header import ImageSize
from finesight.encode.box_migration import BOX_FORMATS, FrameSizes, convert_boxes
from finesight.errors import UserError

CASES = load_cases("box_conversion")

THOUSAND = (1000, 1000)
RESIZED = (280, 560)
TEXTS = {
    "qwen_vl": "<ref>dog</ref><box>(100,200),(300,900)</box>",
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|>"
    "<|box_start|>(100,200),(300,900)<|box_end|>",
    "qwen2_5_vl": '{"bbox_2d": [56, 56, 168, 252], "label": "dog"}',
    "qwen3_vl": '{"bbox_2d": [100, 200, 300, 900], "label": "dog"}',
}
"""The same box: from a tenth to three tenths across, from a fifth to nine tenths down."""


def frames(source: str, target: str, resized: ImageSize = RESIZED) -> FrameSizes:
    old, new = (resized if name == "qwen2_5_vl" else THOUSAND for name in (source, target))
    return lambda: (old, new)


def to(text: str, source: str, target: str, resized: ImageSize = RESIZED) -> str:
    return convert_boxes(text, source, target, frames(source, target, resized))[0]


@pytest.mark.parametrize(("source", "target"), itertools.permutations(BOX_FORMATS, 2))
def test_conversion_between_all_families(source: str, target: str) -> None:
    text = f"Here: {TEXTS[source]}, you see."
    assert convert_boxes(text, source, target, frames(source, target)) == (
        f"Here: {TEXTS[target]}, you see.",
        1,
    )


@each(("source", "target"), itertools.permutations(BOX_FORMATS, 2))
@each("resized", [(56, 84), RESIZED, (2044, 3584)])
def test_roundtrip_changes_coordinates_by_at_most_one(
    source: str, target: str, resized: ImageSize
) -> None:
    """One unit of the coarser of the two frames."""
    random.seed(f"{source} {target} {resized}")
    height, width = resized if source == "qwen2_5_vl" else THOUSAND
    coarse = {
        side: max(1, size / 1000, 1000 / other)
        for side, size, other in (
            (0, width, resized[1] if target == "qwen2_5_vl" else 1000),
            (1, height, resized[0] if target == "qwen2_5_vl" else 1000),
        )
    }
    limit = 1 if source == "qwen_vl" else 0
    for _ in range(200):
        x1, x2 = sorted(random.choices(range(width + 1 - limit), k=2))
        y1, y2 = sorted(random.choices(range(height + 1 - limit), k=2))
        if source in ("qwen2_5_vl", "qwen3_vl"):
            text = json.dumps({"bbox_2d": [x1, y1, x2, y2], "label": "a b"})
        else:
            text = TEXTS[source].replace("(100,200),(300,900)", f"({x1},{y1}),({x2},{y2})")
        back = to(to(text, source, target, resized), target, source, resized)
        values = _coordinates(back, source)
        for location, (before, after) in enumerate(zip((x1, y1, x2, y2), values, strict=True)):
            assert abs(after - before) <= coarse[location % 2], f"{text} became {back}"


def _coordinates(text: str, family: str) -> list[int]:
    if family in ("qwen2_5_vl", "qwen3_vl"):
        return list(json.loads(text)["bbox_2d"])
    pairs = text[text.index("(") : text.rindex(")") + 1]
    return [int(piece.strip("()")) for piece in pairs.split(",")]


def test_boxes_that_share_a_label() -> None:
    text = "<ref>dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and <box>(1,1),(2,2)</box>"
    assert to(text, "qwen_vl", "qwen2_vl") == (
        "<|object_ref_start|>dogs<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
        "<|box_start|>(5,6),(7,8)<|box_end|> and <|box_start|>(1,1),(2,2)<|box_end|>"
    )
    assert to(text, "qwen_vl", "qwen3_vl") == (
        '[{"bbox_2d": [1, 2, 3, 4], "label": "dogs"}, {"bbox_2d": [5, 6, 7, 8], "label": "dogs"}]'
        ' and {"bbox_2d": [1, 1, 2, 2]}'
    )


def test_references_without_a_box() -> None:
    text = "<ref>A dog</ref> barks at <ref>a cat</ref><box>(1,2),(3,4)</box>"
    assert to(text, "qwen_vl", "qwen3_vl") == (
        'A dog barks at {"bbox_2d": [1, 2, 3, 4], "label": "a cat"}'
    )
    assert to(text, "qwen_vl", "qwen2_vl").startswith("<|object_ref_start|>A dog<|object_ref_end|>")


def test_qwen_vl_coordinates_are_below_1000() -> None:
    text = '{"bbox_2d": [0, 0, 1000, 1000]}'
    assert to(text, "qwen3_vl", "qwen_vl") == "<box>(0,0),(999,999)</box>"
    assert to(text, "qwen3_vl", "qwen2_vl") == "<|box_start|>(0,0),(1000,1000)<|box_end|>"


def test_json_conversion_changes_only_coordinates() -> None:
    text = '```json\n[\n\t{"bbox_2d": [%s], "score": 0.5},\n\t{"a": [1, 2, 3, 4]}]\n```'
    written = to(text % "56, 56.0,168,252", "qwen2_5_vl", "qwen3_vl")
    assert written == text % "100, 200, 300, 900"


def test_lists_and_code_fences_become_markup() -> None:
    text = (
        'So:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8]}]\n```\n'
    )
    assert to(text, "qwen3_vl", "qwen_vl") == (
        "So:\n<ref>a</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>\n"
    )


@pytest.mark.parametrize("source", BOX_FORMATS)
def test_text_without_boxes_is_unchanged(source: str) -> None:
    for text in ("", "A dog.", '{"a": [1, 2]}', "(1,2),(3,4)", "[", "x < y"):
        target = "qwen2_vl" if source != "qwen2_vl" else "qwen_vl"
        assert convert_boxes(text, source, target, frames(source, target)) == (text, 0)


@each(("text", "source", "target", "what"), CASES["test_invalid_boxes_are_rejected"])
def test_invalid_boxes_are_rejected(text: str, source: str, target: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        to(text, source, target)
    assert caught.value.expected
    assert caught.value.remedy
