"""Lines by their places: any of them, in any order, as an editor numbers them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finesight.data.lines import Lines, find_lines
from finesight.errors import UserError


def found(path: Path, content: bytes) -> Lines:
    path.write_bytes(content)
    return find_lines(path)


@pytest.mark.parametrize(
    "content",
    [
        b"one\n\ntwo \n   \nthree\n",
        b"one\n\ntwo \n   \nthree",
        b"\xef\xbb\xbfone\n\ntwo \n\t\nthree\n\n\n",
        b"one\r\n\r\ntwo \r\n\r\nthree\r\n",
    ],
    ids=["plain", "no last end", "byte order mark", "carriage returns"],
)
def test_blank_lines_count_but_are_passed_over(tmp_path: Path, content: bytes) -> None:
    lines = found(tmp_path / "a.jsonl", content)
    assert len(lines) == 3
    assert [lines[i].strip() for i in (2, 0, 1)] == [b"three", b"one", b"two"]
    assert [line.strip() for line in lines] == [b"one", b"two", b"three"]
    assert [lines.where(i).rpartition(":")[2] for i in range(3)] == ["1", "3", "5"]


def test_only_so_many_from_the_start(tmp_path: Path) -> None:
    lines = found(tmp_path / "a.jsonl", b"1\n2\n3\n")
    assert [line.strip() for line in lines.first(2)] == [b"1", b"2"]
    assert len(lines.first(9)) == 3
    assert lines.first(None) is lines


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \n"])
def test_nothing_in_a_file(tmp_path: Path, content: bytes) -> None:
    assert list(found(tmp_path / "a.jsonl", content)) == []


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    lines = found(tmp_path / "train.jsonl", b"1\n")
    (tmp_path / "train.jsonl").rename(tmp_path / "trains.jsonl")
    with pytest.raises(UserError, match=r"did you mean .*trains\.jsonl"):
        _ = lines[0]
    with pytest.raises(UserError, match="cannot be read"):
        find_lines(tmp_path)


def test_a_line_costs_three_numbers(tmp_path: Path) -> None:
    lines = found(tmp_path / "a.jsonl", b'{"a": 1}\n' * 200_000)
    held = sum(array.nbytes for array in (lines.starts_N, lines.stops_N, lines.numbers_N))
    assert held <= 24 * len(lines)
    assert lines[199_999] == b'{"a": 1}\n'
