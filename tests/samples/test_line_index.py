"""Line offsets: random access to lines with the line numbers of an editor."""

import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from finesight.samples import line_index
from finesight.samples.line_index import IndexedLines, UnreadableFileError, read_lines


def write_and_index(path: Path, content: bytes) -> IndexedLines:
    path.write_bytes(content)
    return IndexedLines.open(path)


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
def test_blank_lines_are_skipped_but_counted(tmp_path: Path, content: bytes) -> None:
    lines = write_and_index(tmp_path / "a.jsonl", content)
    assert len(lines) == 3
    assert [lines[i].strip() for i in (2, 0, 1)] == [b"three", b"one", b"two"]
    assert [lines.location(i).rpartition(":")[2] for i in range(3)] == ["1", "3", "5"]
    assert list(read_lines(lines.path)) == [(lines[i], lines.location(i)) for i in range(3)]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \n"])
def test_empty_file_and_limited_lines(tmp_path, content):
    assert len(write_and_index(tmp_path / "a.jsonl", content)) == 0
    assert list(read_lines(tmp_path / "a.jsonl")) == []
    lines = write_and_index(tmp_path / "a.jsonl", b"1\n2\n3\n")
    assert [lines.take(2)[i].strip() for i in range(len(lines.take(2)))] == [b"1", b"2"]
    assert len(lines.take(9)) == len(lines.take(None)) == 3


def test_missing_file_error_suggests_name(tmp_path: Path) -> None:
    lines = write_and_index(tmp_path / "train.jsonl", b"1\n")
    (tmp_path / "train.jsonl").rename(tmp_path / "trains.jsonl")
    with pytest.raises(UnreadableFileError, match=r"did you mean .*trains\.jsonl"):
        _ = lines[0]
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        IndexedLines.open(tmp_path)


@pytest.mark.parametrize("content", [b"x\ny\nz\n", b"a\nb\n", b"a\nb\nc\nd\n"])
def test_changed_file_is_detected(tmp_path: Path, content: bytes) -> None:
    """Written anew with lines as long, cut off, or with one more: no line is read any more."""
    path = tmp_path / "a.jsonl"
    lines = write_and_index(path, b"a\nb\nc\n")
    os.utime(path, ns=(0, 0))
    lines = IndexedLines.open(path)
    assert lines[1] == b"b\n"
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"a\.jsonl: has changed[\s\S]*--resume"):
        _ = lines[1]


def test_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_bytes, args=(b"a\n\nb\n",))
    writing.start()
    assert list(read_lines(pipe)) == [(b"a\n", f"{pipe}:1"), (b"b\n", f"{pipe}:3")]
    writing.join()


def test_index_memory_per_line_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 200_000)
    tracemalloc.start()
    lines = IndexedLines.open(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 80 * len(lines)
    assert lines[199_999] == b'{"a": 1}\n'


@pytest.fixture
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
    monkeypatch.setattr("finesight.samples.line_index.IndexedLines.build_index", None)
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
