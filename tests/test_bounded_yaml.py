"""YAML that others wrote: data within bounds, or an error that names the line."""

from __future__ import annotations

import tracemalloc

import pytest
import yaml

from finesight.bounded_yaml import (
    MAX_ALIASED_VALUES,
    MAX_DEPTH,
    ComposedYaml,
    TooManyValuesError,
    load_yaml,
)

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
