"""Files of others: regular, of bounded size, JSON and YAML within bounds."""

import itertools
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import pytest
import yaml
from case_files import load_cases

from finesight.errors import UserError
from finesight.files import bounded_files as files

CASES = load_cases("bounded_files")

READERS: list[Callable[[Path], object]] = [
    lambda path: files.read_bytes(path, expected="a file"),
    lambda path: files.read_text(path, expected="a file"),
    files.read_json,
    files.read_json_object,
    lambda path: list(files.read_lines(path, expected="lines")),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("location", ["folder", "pipe", "/dev/zero", "link", "missing", "null\0"])
def test_only_regular_files_are_read(read, location, tmp_path):
    """A named pipe does not block, a device does not fill the memory."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        read(tmp_path / location)
    assert caught.value.where


def test_a_larger_file_is_refused(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    assert len(files.read_bytes(path, expected="a file", max_bytes=11)) == 11
    with pytest.raises(UserError, match="more than 10 bytes"):
        files.read_bytes(path, expected="a file", max_bytes=10)
    limit = files.MAX_LINE_BYTES  # longer lines are cut, and the next ones are read
    path.write_bytes(b"1\n" + b"2" * (2 * limit + 3) + b"\n3\n" + b"4" * limit)
    lines = list(files.read_lines(path, expected="lines"))
    assert lines == [b"1\n", b"2" * limit, b"3\n", b"4" * limit]


@pytest.mark.parametrize("open_and_close", ["[]", '{"a":}'])
def test_json_of_any_depth_is_read_or_refused_by_a_value_error(open_and_close: str) -> None:
    half = len(open_and_close) // 2 if open_and_close == "[]" else 5
    start, end = open_and_close[:half], open_and_close[half:]
    assert files.parse_json(start * 150 + "0" + end * 150) is not None
    for depth in (300, 5_000, 1_000_000):
        with pytest.raises(ValueError, match="recursion limit"):
            files.parse_json(start * depth + "0" + end * depth)


@pytest.mark.parametrize(
    "text", ["", "{", '"\ud800"', '"\\ud800"', b'"\xff"', "9" * 5000, "[1,]", b"\xff\xfe[\0]\0"]
)
def test_whatever_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        files.parse_json(text)


def test_non_finite_values_are_read() -> None:
    """Metrics have NaN for the figures of a step without any."""
    found = files.parse_json('{"loss": NaN, "norm": -Infinity, "large": 1e400}')
    assert math.isnan(found["loss"])
    assert (found["norm"], found["large"]) == (-math.inf, math.inf)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_an_object_is_wanted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert files.read_json_object(path) == {"a": [1]}
    path.write_text(text)
    with pytest.raises(UserError, match=r"contains a \w+, not an object|not readable as JSON"):
        files.read_json_object(path)


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
        for read in (files.load_yaml, files.ComposedYaml):
            with pytest.raises(
                yaml.YAMLError, match=f"more than {files.MAX_ALIASED_VALUES} values"
            ):
                read(text)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_aliases_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    both = {"x": 1, "y": 2}
    assert files.load_yaml(text) == {"a": both, "b": {"x": 1, "y": 3}, "c": [both, both]}


@pytest.mark.parametrize(
    ("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")]
)
def test_nesting_depth_is_limited(opening, closing):
    # The limit of PyYAML 6.0.4 is reached first.
    with pytest.raises(yaml.YAMLError, match=f"more than {files.MAX_DEPTH}|maximum nesting depth"):
        files.load_yaml(opening * 20_000)
    depth = files.MAX_DEPTH // 4
    assert files.ComposedYaml(opening * depth + "x" + closing * depth).root is not None


def test_too_many_values_are_refused_with_location() -> None:
    text = "".join(f"k{number}: {number}\n" for number in range(1000))
    with pytest.raises(files.TooManyValuesError, match="more than 100 values") as caught:
        files.ComposedYaml(text, 100)
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 49
    assert files.ComposedYaml("[1, 2, 3, 4, 5, 6]", 7).data() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", CASES["test_invalid_values_are_rejected"])
def test_invalid_values_are_rejected(value: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        files.load_yaml(f"first: 1\nsecond: {value}\n")
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 1
    assert len(str(caught.value.problem)) < 200


CAT = "\u4e2d\u6587\u732b"


def in_gbk(name: str) -> str:
    """A name in GBK as Python gives it from a folder."""
    return os.fsdecode(name.encode("gbk"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jpg", "a.jpg"),
        (f"{CAT}.jpg", f"{CAT}.jpg"),
        (in_gbk(f"{CAT}.jpg"), f"{CAT}.jpg"),
        (f"{CAT}/{in_gbk(CAT)}/a.jpg", f"{CAT}/{CAT}/a.jpg"),
        ("caf\udce9.jpg", "caf%E9.jpg"),
        ("a\udcff\udcfeb", "a%FF%FEb"),
        ("\ud83d.jpg", "%3D.jpg"),
    ],
)
def test_readable_names(name: str, text: str) -> None:
    assert files.to_readable_name(name) == text
    assert files.is_utf8(files.to_readable_name(name))
    assert files.is_utf8(name) is (name == text)


def test_spellings_of_a_path() -> None:
    assert list(files.iter_spellings("a/b.jpg")) == ["a/b.jpg"]
    assert list(files.iter_spellings("a\\b.jpg")) == ["a\\b.jpg", "a/b.jpg"]
    assert list(files.iter_spellings("a%20b%.jpg")) == ["a%20b%.jpg", "a b%.jpg"]
    assert "\u00fc.jpg" in files.iter_spellings("u%CC%88.jpg")
    misread = f"{CAT}.jpg".encode("gbk").decode("cp437")
    assert list(files.iter_spellings(f"{CAT}.jpg")) == [f"{CAT}.jpg", in_gbk(f"{CAT}.jpg"), misread]
    assert list(files.iter_spellings("\udcd6.jpg")) == ["\udcd6.jpg"]


@pytest.mark.parametrize(("folder_form", "form"), list(itertools.product(("NFC", "NFD"), repeat=2)))
def test_composed_and_decomposed_names_are_equal(tmp_path, folder_form, form):
    folder, stem = normalize(folder_form, "Übung"), normalize(form, "Käse-가")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"{stem}.jpg").touch()
    for spelling in ("NFC", "NFD"):
        name = normalize(spelling, "Übung/Käse-가.jpg")
        assert files.find_existing(tmp_path, name) == tmp_path / folder / f"{stem}.jpg"


@pytest.mark.parametrize("there", [CAT, in_gbk(CAT), CAT.encode("gbk").decode("cp437")])
def test_a_name_is_found_however_it_was_unpacked(tmp_path: Path, there: str) -> None:
    (tmp_path / f"{there}.jpg").touch()
    assert files.find_existing(tmp_path, f"{CAT}.jpg") == tmp_path / f"{there}.jpg"
    assert files.find_existing(tmp_path, "other.jpg") is None
    assert files.find_existing(tmp_path, "a\0b") is None


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(100, "abcdefghij"), (20, "abcdefghij"), (19, "abcdghij"), (8, "abij"), (5, "aj"), (3, "")],
)
def test_lines_at_both_ends_of_a_file(tmp_path: Path, max_bytes: int, expected: str) -> None:
    (tmp_path / "a").write_text("".join(f"{letter}\n" for letter in "abcdefghij"))
    lines = [*files.read_edge_lines(tmp_path / "a", max_bytes, expected="lines")]
    assert b"".join(lines).decode() == "".join(f"{letter}\n" for letter in expected)


def test_lines_end_with_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\rb\r\nc\x0cd\n\ne")
    lines = [b"a\rb\r\n", b"c\x0cd\n", b"\n", b"e"]
    assert [*files.read_edge_lines(tmp_path / "a", 100, expected="lines")] == lines
    assert [*files.read_lines(tmp_path / "a", expected="lines")] == lines


@pytest.mark.parametrize(
    "text", ["&a [*a]", "a: &a {b: *a}", "&a {<<: *a}", "&a {? *a : 1}", "[&a [&b [*a]], *a]"]
)
def test_alias_of_a_group_in_itself_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="a group contains itself"):
        files.load_yaml(text)
