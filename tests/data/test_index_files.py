"""Indices of large files: kept, mapped, and never taken for those of another file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from finesight.data import index_files
from finesight.data.lines import Lines, find_lines


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices lie; every file is a large one."""
    monkeypatch.setattr(index_files, "LEAST", dict.fromkeys(index_files.LEAST, 1))
    monkeypatch.setattr(index_files, "index_folder", lambda: tmp_path / "index")
    return tmp_path / "index"


def same(one: Lines, other: Lines) -> bool:
    pairs = zip(one.index, other.index, strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs) and one.state == other.state


def test_found_once_and_the_same_from_the_disk(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\ntwo\n  \nthree")
    lines = find_lines(path)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr("finesight.data.lines._found", None)
    again = find_lines(path)
    assert same(lines, again)
    assert [again[i] for i in range(3)] == [b"one\n", b"two\n", b"three"]
    assert again.where(2) == f"{path}:5"
    assert len(again.first(2)) == 2


def test_another_file_is_read_anew(tmp_path: Path, kept: Path) -> None:
    """Written to in place, its time set back, or another one under its name."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    first = find_lines(path)
    times = path.stat()
    path.write_bytes(b"abc\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = find_lines(path)
    assert (len(first), len(second)) == (2, 1)
    (tmp_path / "b").write_bytes(b"abcd")
    os.utime(tmp_path / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "b").replace(path)
    third = find_lines(path)
    assert third[0] == b"abcd"
    assert len({one.index.digest for one in (first, second, third)}) == 3
    assert len(list(kept.iterdir())) == 3


@pytest.mark.parametrize("cut", [0, 5, 72, -8, -1])
def test_a_damaged_index_is_made_again(tmp_path: Path, kept: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    lines = find_lines(path)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    flipped = bytes([whole[cut] ^ 1])
    spoilt = whole[:cut] + flipped + whole[cut:][1:]
    for content in (whole[:cut], spoilt):
        file.write_bytes(content)
        assert same(find_lines(path), lines)
        assert file.read_bytes() == whole


def test_without_room_for_it(tmp_path: Path, kept: Path) -> None:
    kept.write_bytes(b"no folder")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    assert len(find_lines(path)) == 2


def test_what_nobody_asks_for_goes(tmp_path: Path, kept: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"1\n")
        find_lines(tmp_path / name)
    for file in kept.iterdir():
        os.utime(file, (0, 0))
    find_lines(tmp_path / "a.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"1\n")
    find_lines(tmp_path / "c.jsonl")
    assert len(list(kept.iterdir())) == 2


def test_small_files_leave_nothing(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "LEAST", {"lines": 4})
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    find_lines(tmp_path / "a.jsonl")
    assert not kept.exists()
