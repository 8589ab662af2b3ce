"""Tests of the numbers of lines that a page shows."""

import os

import pytest

from finesight.app import line_counter
from finesight.app.line_counter import LineCounter
from finesight.files.bounded_files import SpecialFileError


@pytest.fixture
def counter(monkeypatch):
    monkeypatch.setattr(line_counter, "MAX_COUNTED_BYTES", 1000)
    monkeypatch.setattr(line_counter, "SAMPLE_BYTES", 100)
    monkeypatch.setattr(line_counter, "CHUNK_BYTES", 30)
    counter = LineCounter()
    counter.start_page()
    return counter


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", (0, False)),
        (b"{}", (0, False)),
        (b"{}\n" * 300, (300, False)),
        (b"\n" * 1000, (1000, False)),
        (b"\n" * 1234, (1200, True)),
        (b"\0" * 2000, (0, True)),
        (b"{:9}\n" * 1001, (1000, True)),
    ],
)
def test_lines_of_large_files_are_estimated(counter, tmp_path, content, expected):
    (tmp_path / "a").write_bytes(content)
    counter.start_page()
    assert counter.count(tmp_path / "a") == expected


def test_files_of_one_page_share_its_bytes(counter, tmp_path):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"{}\n" * 200)
    assert [counter.count(file) for file in files] == [(200, False), (200, True), (200, True)]
    # Further pages count the files that the first one has left.
    for num_estimates in (1, 0, 0):
        counter.start_page()
        counts = [counter.count(file) for file in files]
        assert [one.number for one in counts] == [200] * 3
        assert sum(one.is_estimate for one in counts) == num_estimates


def test_small_files_beyond_the_bytes_of_a_page_are_not_underestimated(counter, tmp_path):
    """The sample of a smaller file is the whole file."""
    (tmp_path / "a").write_bytes(b"\n" * 1000)
    (tmp_path / "b").write_bytes(b"{:7}\n" * 12)
    (tmp_path / "empty").touch()
    counts = [counter.count(tmp_path / name) for name in ("a", "b", "empty")]
    assert counts == [(1000, False), (12, True), (0, False)]


def test_changed_file_is_counted_again(counter, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"{}\n" * 5)
    assert counter.count(file) == (5, False)
    file.write_bytes(b"{}\n" * 6)
    assert counter.count(file) == (6, False)
    os.truncate(file, 300 << 30)
    assert counter.count(file).is_estimate
    os.truncate(file, 3)
    assert counter.count(file) == (1, False)


def test_special_files_are_not_read(counter, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecialFileError):
        counter.count(tmp_path / "pipe")
