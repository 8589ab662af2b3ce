"""Sources made to hang, fill memory or crash an import: each is refused with a message."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from scenery import paint

from finesight.data import lines
from finesight.data.importing import Summary, import_file
from finesight.data.opening import Request
from finesight.data.origins import brought
from finesight.errors import UserError

HANG_S = 60


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Fail a test that waits for ever in place of the whole suite."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"nothing happened for {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def imported(source: Path, **request: object) -> Summary:
    """Import a source as the command does, into `out` beside it."""
    out = source.parent / "out"
    with brought(str(source), out, Request(**request)) as found:  # type: ignore[arg-type]
        return import_file(found.path, out, found.request)


def refusal(source: Path, **request: object) -> UserError:
    """The error of an import that leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        imported(source, **request)
    assert caught.value.where
    assert caught.value.remedy
    assert not (source.parent / "out").exists()
    return caught.value


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.tar", "a.zip", "a.tgz"]
)
def test_named_pipe_as_source(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "a named pipe, not a regular file" in refusal(tmp_path / name).what


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.tar"])
def test_device_as_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    assert "a device, not a regular file" in refusal(tmp_path / name).what


@pytest.mark.parametrize(
    "name", ["b.txt", "b.xml", "b.json", "b.parquet", "b.jpg", "data.yaml", "in/classes.txt"]
)
def test_named_pipe_in_a_folder(tmp_path: Path, name: str) -> None:
    paint(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "a.txt").write_text("a house")
    (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "set" / name)
    error = refusal(tmp_path / "set", prompt="?")
    assert "a named pipe" in error.what
    assert error.where == str(tmp_path / "set" / name)


def test_named_pipe_behind_a_link(tmp_path: Path) -> None:
    paint(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "a.txt").symlink_to(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe" in refusal(tmp_path / "set", prompt="?").what


def test_list_of_images_that_is_a_pipe(tmp_path: Path) -> None:
    """A data.yaml may name files outside of its folder."""
    paint(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "data.yaml").write_text("names: [dog]\ntrain: ../list.txt\n")
    os.mkfifo(tmp_path / "list.txt")
    assert "a named pipe" in refusal(tmp_path / "set").what


def test_named_pipe_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        pipe = zipfile.ZipInfo("a.txt")
        pipe.external_attr = 0o010644 << 16
        archive.writestr(pipe, "")
    assert "a link or a device" in refusal(tmp_path / "a.zip").what


def sparse(path: Path) -> Path:
    """A file whose second line has 64 MiB of zero bytes, which take no room on the disk."""
    with path.open("wb") as file:
        file.write(b'{"query": "a", "response": "b"}\n')
        file.seek(2**26)
        file.write(b"0\n")
    return path


@pytest.mark.parametrize("read", [lines.find_lines, lambda path: [*lines.read_lines(path)], None])
def test_line_over_the_limit(tmp_path: Path, read: Callable[[Path], object] | None) -> None:
    path = sparse(tmp_path / "a.jsonl")
    if read is None:
        error = refusal(path)
    else:
        with pytest.raises(UserError) as caught:
            read(path)
        error = caught.value
    assert "a line of more than 33,554,432 bytes" in error.what
    assert error.where == f"{path}:2"


def test_line_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    for content in (b"a\n" + b"b" * 9 + b"\nc", b"a\n" + b"b" * 9 + b"\n"):
        path.write_bytes(content)
        monkeypatch.setattr(lines, "LARGEST_LINE", 10)
        assert len(lines.find_lines(path)) == len([*lines.read_lines(path)])
        monkeypatch.setattr(lines, "LARGEST_LINE", 9)
        for read in (lines.find_lines, lambda path: [*lines.read_lines(path)]):
            with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 9 bytes"):
                read(path)
