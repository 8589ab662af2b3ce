"""JSON is found wherever it stands in a text, and boxes in it are told from the words around."""

from __future__ import annotations

import json
import signal

import pytest

from finesight.data.json_boxes import LEVELS, Item, around_boxes, box_item, json_values, unfenced

ONE = '{"bbox_2d": [1, 2, 3, 4], "label": "dog"}'


def test_values_are_found_from_left_to_right_and_none_within_another() -> None:
    text = f"a [1, {{}}] b {{broken c {ONE} ["
    found = list(json_values(text))
    assert [one.value for one in found] == [[1, {}], json.loads(ONE)]
    assert [text[one.start : one.stop] for one in found] == ["[1, {}]", ONE]
    # Objects alone are found in a list that breaks off.
    assert [one.value for one in json_values(f"[{ONE}, {ONE}, {{", "{")] == [json.loads(ONE)] * 2


def test_too_deep_a_nesting_is_passed_over() -> None:
    assert list(json_values("[" * 100_000, "{")) == []


def test_value_over_the_limit_of_levels_is_passed_over() -> None:
    deepest = "[" * LEVELS + "]" * LEVELS
    assert len(list(json_values(deepest))) == 1
    assert list(json_values(f"[{deepest}]")) == []
    assert list(json_values("[" * 900 + "]" * 900)) == []


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
        assert list(json_values(text)) == []
        assert unfenced(text) == text
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
def test_texts_and_boxes_come_in_turn(text: str, pieces: list[object]) -> None:
    assert list(around_boxes(text)) == pieces


def test_only_fences_around_boxes_are_taken_off() -> None:
    assert unfenced(f"```json\n{ONE}\n```") == ONE
    assert unfenced('```json\n{"a": 1}\n```') == '```json\n{"a": 1}\n```'


def test_an_item_is_a_box_with_at_most_a_label() -> None:
    assert box_item(json.loads(ONE)) == Item([1, 2, 3, 4], "dog")
    assert box_item({"bbox_2d": "x", "text_content": 5}) == Item("x", "5")
    assert box_item({"bbox_2d": [], "score": 1}) is None
    assert box_item([1, 2, 3, 4]) is None
