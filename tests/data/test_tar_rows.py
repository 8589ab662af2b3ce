"""WebDataset tars as rows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hubs import picture

from finesight.data import tar_rows
from finesight.data.tar_rows import is_webdataset, open_tar, parts_of
from finesight.errors import UserError


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_by_name(tmp_path: Path) -> None:
    files = {}
    for n in range(5):
        files[f"train/{n:04}.png"] = picture(n)
        files[f"train/{n:04}.txt"] = f"caption {n}\n".encode()
        files[f"train/{n:04}.json"] = json.dumps({"width": 64, "image": "x"}).encode()
    files["__index__"] = b"x"
    tar = tar_of(tmp_path / "a.tar", files)
    assert is_webdataset(tar)
    rows = open_tar(tar)
    assert rows.total == 5
    (second, third) = rows.select(1, 3)
    assert (second.number, second.place) == (2, "sample train/0001")
    assert second.record == {
        "id": "train/0001", "image": picture(1), "txt": "caption 1", "width": 64
    }  # fmt: skip
    assert third.record["txt"] == "caption 2"


def test_several_pictures_a_sample(tmp_path: Path) -> None:
    files = {"1.left.png": picture(1), "1.right.png": picture(2), "1.json": b"[3]"}
    (row,) = open_tar(tar_of(tmp_path / "a.tar", files)).select(0, 1)
    assert row.record == {
        "id": "1", "left.png": picture(1), "right.png": picture(2), "json": [3]
    }  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"images/1.png": b"", "labels/1.txt": b""},
        {"1.png": b"", "1.txt": b"", "classes.txt": b""},
        {"train.jsonl": b"", "1.png": b""},
        {"1.png": b"", "1.json": b'{"imagePath": "1.png"}'},
        {},
    ],
)
def test_other_tars_are_archives(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert not is_webdataset(tar_of(tmp_path / "a.tar", files))


def test_bad_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tar_of(tmp_path / "a.tar", {"1.png": picture(1), "1.txt": b"a", "1.json": b"{"})
    with pytest.raises(UserError, match=r"1\.json: broken JSON"):
        list(open_tar(whole).select(0, 1))
    tar_of(whole, {"1.png": picture(1), "1.txt": b"\xff"})
    with pytest.raises(UserError, match="not UTF-8"):
        list(open_tar(whole).select(0, 1))
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(UserError, match=r"ends early|cannot be read"):
        list(open_tar(whole).select(0, 1))
    (tmp_path / "none.tar").write_bytes(b"none" * 300)
    for read in (open_tar, is_webdataset):
        with pytest.raises(UserError, match="cannot be read: ReadError"):
            read(tmp_path / "none.tar")
    with pytest.raises(UserError, match="no such file"):
        open_tar(tmp_path / "missing.tar")
    with pytest.raises(UserError, match="holds no samples"):
        open_tar(tar_of(tmp_path / "empty.tar", {}))
    monkeypatch.setattr(tar_rows, "LARGEST", 10)
    with pytest.raises(UserError, match="has 11 bytes"):
        list(open_tar(tar_of(whole, {"1.txt": b"a" * 11})).select(0, 1))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./0001.jpg", ("0001", "jpg")),
        ("./a//b.left.JPG", ("a/b", "left.jpg")),
        ("a.b/c.d", ("a.b/c", "d")),
        ("a/../b.c", ("a/../b", "c")),
        ("/b.c", ("/b", "c")),
        ("/a/b", ("/a/b", "")),
        ("a/.hidden", ("a/", "hidden")),
    ],
)
def test_what_files_of_a_sample_share(name: str, parts: tuple[str, str]) -> None:
    assert parts_of(tarfile.TarInfo(name)) == parts
