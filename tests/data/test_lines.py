"""Lines by their places: any of them, in any order, as an editor numbers them."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from finesight.data.lines import Lines, Unreadable, find_lines, read_lines


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
    assert [lines.where(i).rpartition(":")[2] for i in range(3)] == ["1", "3", "5"]
    assert list(read_lines(lines.path)) == [(lines[i], lines.where(i)) for i in range(3)]


def test_only_so_many_from_the_start(tmp_path: Path) -> None:
    lines = found(tmp_path / "a.jsonl", b"1\n2\n3\n")
    assert [lines.first(2)[i].strip() for i in range(len(lines.first(2)))] == [b"1", b"2"]
    assert len(lines.first(9)) == len(lines.first(None)) == 3


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \n"])
def test_nothing_in_a_file(tmp_path: Path, content: bytes) -> None:
    assert len(found(tmp_path / "a.jsonl", content)) == 0
    assert list(read_lines(tmp_path / "a.jsonl")) == []


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    lines = found(tmp_path / "train.jsonl", b"1\n")
    (tmp_path / "train.jsonl").rename(tmp_path / "trains.jsonl")
    with pytest.raises(Unreadable, match=r"did you mean .*trains\.jsonl"):
        _ = lines[0]
    with pytest.raises(Unreadable, match="cannot be read"):
        find_lines(tmp_path)


@pytest.mark.parametrize("content", [b"x\ny\nz\n", b"a\nb\n", b"a\nb\nc\nd\n"])
def test_other_lines_are_never_taken_for_the_old_ones(tmp_path: Path, content: bytes) -> None:
    """Written anew with lines as long, cut off, or with one more: no line is read any more."""
    path = tmp_path / "a.jsonl"
    lines = found(path, b"a\nb\nc\n")
    os.utime(path, ns=(0, 0))
    lines = find_lines(path)
    assert lines[1] == b"b\n"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=r"a\.jsonl: has changed[\s\S]*--resume"):
        _ = lines[1]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_bytes, args=(b"a\n\nb\n",))
    writing.start()
    assert list(read_lines(pipe)) == [(b"a\n", f"{pipe}:1"), (b"b\n", f"{pipe}:3")]
    writing.join()


def test_a_line_costs_a_few_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 200_000)
    tracemalloc.start()
    lines = find_lines(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 80 * len(lines)
    assert lines[199_999] == b'{"a": 1}\n'


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(Unreadable, match="a device, not a regular file"):
        find_lines(Path("/dev/zero"))
