"""Features on disk: whole or not there, the oldest gone first, none while somebody needs it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finesight.errors import UserError
from finesight.train import feature_files
from finesight.train.feature_files import FeatureFiles, read_rows


def features(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        written = files.write("a", features(1, dtype))
        room = torch.empty(5, 2, 8, dtype=dtype)
        assert files.read("a", room) == written
        assert torch.equal(room, features(1, dtype))
        rows = torch.empty(2, 2, 8, dtype=dtype)
        read_rows(written, 3, rows)
        assert torch.equal(rows, features(1, dtype)[3:])
        assert torch.equal(load_file(written.path)["features"], room)
        assert files.read("b", room) is None
    assert [path.name for path in (tmp_path / "tower").iterdir()] == ["a.safetensors"]


def test_another_type_is_not_taken(tmp_path: Path) -> None:
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        files.write("a", features(1, torch.float16))
        assert files.read("a", torch.empty(5, 2, 8, dtype=torch.bfloat16)) is None
        assert not files.has("a")


@pytest.mark.parametrize("fault", ["gone", "cut off"])
def test_a_file_that_is_lost_on_the_way_is_told(tmp_path: Path, fault: str) -> None:
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        stored = files.write("a", features(1))
    if fault == "gone":
        stored.path.unlink()
    else:
        os.truncate(stored.path, stored.path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"a\.safetensors: features[^\n]*(No such file|cut off)"):
        read_rows(stored, 0, torch.empty(5, 2, 8))


def aged(folder: Path, count: int) -> list[Path]:
    """Files of one tower, the first one unused for longest."""
    with closing(FeatureFiles(folder, "old")) as files:
        paths = [files.write(str(number), features(number)).path for number in range(count)]
    for number, path in enumerate(paths):
        os.utime(path, (number, number))
    return paths


def test_what_was_not_used_for_longest_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = aged(tmp_path, 5)
    size = paths[0].stat().st_size
    monkeypatch.setattr(feature_files, "MOST_BYTES", 6 * size)
    with closing(FeatureFiles(tmp_path, "old")) as files:
        assert files.read("0", torch.empty(5, 2, 8)) is not None, "used just now"
        assert files.make_room(["1"], size) == size
        assert all(path.exists() for path in paths)
        assert files.make_room(["1"], 3 * size) == 3 * size
    assert [path.exists() for path in paths] == [True, True, False, False, True]
    with closing(FeatureFiles(tmp_path, "new")) as files:
        assert files.make_room([], 9 * size) == 6 * size, "all are gone, and it is not enough"
    assert not any(path.exists() for path in paths)


def test_nothing_goes_while_another_run_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = aged(tmp_path, 2)
    size = paths[0].stat().st_size
    monkeypatch.setattr(feature_files, "MOST_BYTES", 2 * size)
    with closing(FeatureFiles(tmp_path, "old")) as reading:
        reading.make_room(["0", "1"], 0)
        with closing(FeatureFiles(tmp_path, "new")) as files:
            assert files.make_room([], size) == 0
        assert all(path.exists() for path in paths)
    with closing(FeatureFiles(tmp_path, "new")) as files:
        assert files.make_room([], size) == size
    assert [path.exists() for path in paths] == [False, True]


def test_a_disk_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        assert files.make_room([], 0) == 500


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        left = files.folder / ".a.1234.5678.making"
        left.write_bytes(b"half")
        files.make_room([], 0)
        assert not left.exists()


def test_the_header_is_not_believed(tmp_path: Path) -> None:
    """Offsets that point elsewhere, as long as they fit the file."""
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        path = files.write("a", features(1)).path
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["features"]["data_offsets"] = [4, len(data) - 8 - length + 4]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        assert files.read("a", torch.empty(5, 2, 8)) is None


def test_a_deeply_nested_header_is_not_taken(tmp_path: Path) -> None:
    with closing(FeatureFiles(tmp_path, "tower")) as files:
        path = files.write("a", features(1)).path
        text = b"[" * 200_000
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert files.read("a", torch.empty(5, 2, 8)) is None
    assert not path.exists()
