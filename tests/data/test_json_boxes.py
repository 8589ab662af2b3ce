"""JSON is found wherever it stands in a text, and boxes in it are told from the words around."""

import json
import signal

import pytest

from finesight.data.boxes import (
    MAX_JSON_DEPTH,
    iter_json_values,
    parse_json_box,
    split_at_boxes,
    strip_code_fences,
)

ONE = '{"bbox_2d": [1, 2, 3, 4], "label": "dog"}'


def test_top_level_values_are_found_in_order() -> None:
    text = f"a [1, {{}}] b {{broken c {ONE} ["
    found = list(iter_json_values(text))
    assert [one.value for one in found] == [[1, {}], json.loads(ONE)]
    assert [text[one.start : one.stop] for one in found] == ["[1, {}]", ONE]
    # Objects alone are found in a list that breaks off.
    assert [one.value for one in iter_json_values(f"[{ONE}, {ONE}, {{", "{")] == [
        json.loads(ONE)
    ] * 2


def test_value_over_the_limit_of_levels_is_passed_over() -> None:
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert len(list(iter_json_values(deepest))) == 1
    assert list(iter_json_values(f"[{deepest}]")) == []
    assert list(iter_json_values("[" * 900 + "]" * 900)) == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2_000_000,
        "[0," * 1_000_000,
        ("[" + "0," * 1000) * 1000,
        ('{"a":[' + "0," * 1000) * 1000,
        "```[" + '"bbox_2d" x]' * 500_000,
    ],
)
def test_brackets_that_never_close_take_linear_time(text: str) -> None:
    """In the square of its length any of these takes minutes."""
    signal.alarm(30)
    try:
        assert list(iter_json_values(text)) == []
        assert strip_code_fences(text) == text
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("none", ["none"]),
        (f"a {ONE} b", ["a ", [json.loads(ONE)], " b"]),
        (f"{ONE}{ONE}", ["", [json.loads(ONE)], "", [json.loads(ONE)], ""]),
        (f"[{ONE}, 3]", ["", [json.loads(ONE), 3], ""]),
        (f"[1] {ONE}", ["[1] ", [json.loads(ONE)], ""]),
    ],
)
def test_text_and_boxes_alternate(text: str, pieces: list[object]) -> None:
    assert list(split_at_boxes(text)) == pieces


def test_only_fences_around_boxes_are_removed() -> None:
    assert strip_code_fences(f"```json\n{ONE}\n```") == ONE
    assert strip_code_fences('```json\n{"a": 1}\n```') == '```json\n{"a": 1}\n```'


def test_box_item_with_optional_label() -> None:
    assert parse_json_box(json.loads(ONE)) == ([1, 2, 3, 4], "dog")
    assert parse_json_box({"bbox_2d": "x", "text_content": 5}) == ("x", "5")
    assert parse_json_box({"bbox_2d": [], "score": 1}) is None
    assert parse_json_box([1, 2, 3, 4]) is None
