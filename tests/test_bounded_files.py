"""Files of others: regular, of bounded size, JSON and YAML within bounds."""

from __future__ import annotations

import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from each_value import each

from finesight.bounded_files import (
    MAX_ALIASED_VALUES,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    ComposedYaml,
    TooManyValuesError,
    load_yaml,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    read_lines,
    read_text,
)
from finesight.errors import UserError

READERS: list[Callable[[Path], object]] = [
    lambda path: read_bytes(path, expected="a file"),
    lambda path: read_text(path, expected="a file"),
    read_json,
    read_json_object,
    lambda path: list(read_lines(path, expected="lines")),
]


@pytest.mark.parametrize("read", READERS)
@each("location", ["folder", "pipe", "/dev/zero", "link", "missing", "null\0"])
def test_only_regular_files_are_read(
    read: Callable[[Path], object], location: str, tmp_path: Path
) -> None:
    """A named pipe does not block, a device does not fill the memory."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        read(tmp_path / location)
    assert caught.value.where
    assert caught.value.expected
    assert caught.value.remedy


def test_a_larger_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    assert len(read_bytes(path, expected="a file", max_bytes=11)) == 11
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_bytes(path, expected="a file", max_bytes=10)


@pytest.mark.parametrize("open_and_close", ["[]", '{"a":}'])
def test_json_of_any_depth_is_read_or_refused_by_a_value_error(open_and_close: str) -> None:
    half = len(open_and_close) // 2 if open_and_close == "[]" else 5
    start, end = open_and_close[:half], open_and_close[half:]
    assert parse_json(start * 150 + "0" + end * 150) is not None
    for depth in (300, 5_000, 1_000_000):
        with pytest.raises(ValueError, match="recursion limit"):
            parse_json(start * depth + "0" + end * depth)


@pytest.mark.parametrize(
    "text", ["", "{", '"\ud800"', '"\\ud800"', b'"\xff"', "9" * 5000, "[1,]", b"\xff\xfe[\0]\0"]
)
def test_whatever_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_non_finite_values_are_read() -> None:
    """Metrics have NaN for the figures of a step without any."""
    found = parse_json('{"loss": NaN, "norm": -Infinity, "large": 1e400}')
    assert math.isnan(found["loss"])
    assert (found["norm"], found["large"]) == (-math.inf, math.inf)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_an_object_is_wanted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"contains a \w+, not an object|not readable as JSON"):
        read_json_object(path)


def test_long_lines_are_cut_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + b"2" * (2 * MAX_LINE_BYTES + 3) + b"\n3\n" + b"4" * MAX_LINE_BYTES)
    lines = list(read_lines(path, expected="lines"))
    assert lines == [b"1\n", b"2" * MAX_LINE_BYTES, b"3\n", b"4" * MAX_LINE_BYTES]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines that stand for a billion values."""

MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}], {name}: 1}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [LAUGHS, MERGED])
def test_billion_laughs_is_rejected_early(text: str) -> None:
    tracemalloc.start()
    try:
        for read in (load_yaml, ComposedYaml):
            with pytest.raises(yaml.YAMLError, match=f"more than {MAX_ALIASED_VALUES} values"):
                read(text)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_aliases_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    both = {"x": 1, "y": 2}
    assert load_yaml(text) == {"a": both, "b": {"x": 1, "y": 3}, "c": [both, both]}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_nesting_depth_is_limited(opening: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"more than {MAX_DEPTH}"):
        load_yaml(opening * 20_000)
    closing = {"[": "]", "{a: ": "}"}.get(opening, "")
    assert (
        ComposedYaml(opening * (MAX_DEPTH // 4) + "x" + closing * (MAX_DEPTH // 4)).root is not None
    )


def test_too_many_values_are_refused_with_location() -> None:
    text = "".join(f"k{number}: {number}\n" for number in range(1000))
    with pytest.raises(TooManyValuesError, match="more than 100 values") as caught:
        ComposedYaml(text, 100)
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 49
    assert ComposedYaml("[1, 2, 3, 4, 5, 6]", 7).data() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "value",
    [
        "2020-13-45",
        "0x_",
        "0b_",
        "!!int foo",
        "!!float foo",
        "!!timestamp foo",
        "!!bool foo",
        "!!binary \u00e9",
        "9" * 5000,
        "0x" + "f" * 5000,
        '"a\\0b"',
        '"\\ud800"',
        "!!python/object/apply:os.system [exit]",
    ],
)
def test_invalid_values_are_rejected(value: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        load_yaml(f"first: 1\nsecond: {value}\n")
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 1
    assert len(str(caught.value.problem)) < 200
