"""Indices of large files: kept, mapped, and never taken for those of another file."""

import os
from pathlib import Path

import numpy as np
import pytest

from finesight.data import line_index
from finesight.data.line_index import IndexedLines


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices lie; every file is a large one."""
    monkeypatch.setattr(
        line_index, "MIN_INDEXED_BYTES", dict.fromkeys(line_index.MIN_INDEXED_BYTES, 1)
    )
    monkeypatch.setattr(line_index, "cache_folder", lambda name: tmp_path / "index")
    return tmp_path / "index"


def is_same_index(one: IndexedLines, other: IndexedLines) -> bool:
    pairs = zip(one.index, other.index, strict=True)
    return (
        all(np.array_equal(mine, theirs) for mine, theirs in pairs)
        and one.file_state == other.file_state
    )


def test_index_is_built_once_and_reloaded(tmp_path, cache_folder, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\ntwo\n  \nthree")
    lines = IndexedLines.open(path)
    assert len(list(cache_folder.iterdir())) == 1
    monkeypatch.setattr("finesight.data.line_index.IndexedLines.build_index", None)
    again = IndexedLines.open(path)
    assert is_same_index(lines, again)
    assert [again[i] for i in range(3)] == [b"one\n", b"two\n", b"three"]
    assert again.location(2) == f"{path}:5"
    assert len(again.take(2)) == 2


def test_changed_file_is_indexed_again(tmp_path: Path, cache_folder: Path) -> None:
    """Written to in place, its time set back, or another one under its name."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    first = IndexedLines.open(path)
    times = path.stat()
    path.write_bytes(b"abc\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = IndexedLines.open(path)
    assert (len(first), len(second)) == (2, 1)
    (tmp_path / "b").write_bytes(b"abcd")
    os.utime(tmp_path / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "b").replace(path)
    third = IndexedLines.open(path)
    assert third[0] == b"abcd"
    assert len({one.index.digest for one in (first, second, third)}) == 3
    assert len(list(cache_folder.iterdir())) == 1, "one for each path"


@pytest.mark.parametrize("cut", [0, 5, 40, 104, -8, -1])
def test_damaged_index_is_rebuilt(tmp_path: Path, cache_folder: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    lines = IndexedLines.open(path)
    (file,) = cache_folder.iterdir()
    full = file.read_bytes()
    flipped = bytes([full[cut] ^ 1])
    spoilt = full[:cut] + flipped + full[cut:][1:]
    for content in (full[:cut], spoilt):
        file.write_bytes(content)
        assert is_same_index(IndexedLines.open(path), lines)
        assert file.read_bytes() == full


def test_works_without_cache_folder(tmp_path: Path, cache_folder: Path) -> None:
    cache_folder.write_bytes(b"no folder")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nb\n")
    assert len(IndexedLines.open(path)) == 2


def test_unused_indices_are_removed(tmp_path: Path, cache_folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"1\n")
        IndexedLines.open(tmp_path / name)
    for file in cache_folder.iterdir():
        os.utime(file, (0, 0))
    IndexedLines.open(tmp_path / "a.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"1\n")
    line_index.remove_stale_indexes.cache_clear()
    IndexedLines.open(tmp_path / "c.jsonl")
    assert len(list(cache_folder.iterdir())) == 2


def test_small_files_are_not_cached(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(line_index, "MIN_INDEXED_BYTES", {"lines": 4})
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    IndexedLines.open(tmp_path / "a.jsonl")
    assert not cache_folder.exists()
