"""YAML that others wrote: data within bounds, or an error that names the line."""

from __future__ import annotations

import tracemalloc

import pytest
import yaml

from finesight.yaml_text import DEPTH, REPEATED, Composed, TooManyValues, parsed

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
def test_a_billion_laughs_are_refused_early(text: str) -> None:
    tracemalloc.start()
    try:
        for read in (parsed, Composed):
            with pytest.raises(yaml.YAMLError, match=f"more than {REPEATED} values"):
                read(text)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_aliases_and_merges_mean_what_they_say() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    both = {"x": 1, "y": 2}
    assert parsed(text) == {"a": both, "b": {"x": 1, "y": 3}, "c": [both, both]}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_is_refused(opening: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"more than {DEPTH}"):
        parsed(opening * 20_000)
    closing = {"[": "]", "{a: ": "}"}.get(opening, "")
    assert Composed(opening * (DEPTH // 4) + "x" + closing * (DEPTH // 4)).root is not None


def test_too_many_values_are_refused_where_they_stand() -> None:
    text = "".join(f"k{number}: {number}\n" for number in range(1000))
    with pytest.raises(TooManyValues, match="more than 100 values") as caught:
        Composed(text, 100)
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 49
    assert Composed("[1, 2, 3, 4, 5, 6]", 7).data() == [1, 2, 3, 4, 5, 6]


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
def test_a_value_that_cannot_be_one(value: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        parsed(f"first: 1\nsecond: {value}\n")
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 1
    assert len(str(caught.value.problem)) < 200
