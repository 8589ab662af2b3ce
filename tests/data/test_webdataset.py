"""WebDataset tars as rows."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from hub_fixtures import make_png

from finesight.data import row_reader
from finesight.data.row_reader import is_webdataset, open_webdataset, split_member_name
from finesight.errors import UserError


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_files_are_grouped_by_name(tmp_path: Path) -> None:
    files = {}
    for n in range(5):
        files[f"train/{n:04}.png"] = make_png(n)
        files[f"train/{n:04}.txt"] = f"caption {n}\n".encode()
        files[f"train/{n:04}.json"] = json.dumps({"width": 64, "image": "x"}).encode()
    files["__index__"] = b"x"
    tar = tar_of(tmp_path / "a.tar", files)
    assert is_webdataset(tar)
    rows = open_webdataset(tar)
    assert rows.num_rows == 5
    (second, third) = rows.iter_range(1, 3)
    assert (second.number, second.location) == (2, "sample train/0001")
    assert second.record == {
        "id": "train/0001", "image": make_png(1), "txt": "caption 1", "width": 64, "json.image": "x"
    }  # fmt: skip
    assert third.record["txt"] == "caption 2"


def test_several_images_per_sample(tmp_path: Path) -> None:
    files = {"1.left.png": make_png(1), "1.right.png": make_png(2), "1.json": b"[3]"}
    (row,) = open_webdataset(tar_of(tmp_path / "a.tar", files)).iter_range(0, 1)
    assert row.record == {
        "id": "1", "left.png": make_png(1), "right.png": make_png(2), "json": [3]
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


def test_invalid_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tar_of(tmp_path / "a.tar", {"1.png": make_png(1), "1.txt": b"a", "1.json": b"{"})
    with pytest.raises(UserError, match=r"1\.json: broken JSON"):
        list(open_webdataset(full).iter_range(0, 1))
    tar_of(full, {"1.png": make_png(1), "1.txt": b"\xff"})
    with pytest.raises(UserError, match="not UTF-8"):
        list(open_webdataset(full).iter_range(0, 1))
    full.write_bytes(full.read_bytes()[:700])
    with pytest.raises(UserError, match=r"ends early|cannot be read"):
        list(open_webdataset(full).iter_range(0, 1))
    (tmp_path / "none.tar").write_bytes(b"none" * 300)
    for read in (open_webdataset, is_webdataset):
        with pytest.raises(UserError, match="cannot be read: ReadError"):
            read(tmp_path / "none.tar")
    with pytest.raises(UserError, match="no such file"):
        open_webdataset(tmp_path / "missing.tar")
    with pytest.raises(UserError, match="contains no samples"):
        open_webdataset(tar_of(tmp_path / "empty.tar", {}))
    monkeypatch.setattr(row_reader, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(UserError, match="has 11 bytes"):
        list(open_webdataset(tar_of(full, {"1.txt": b"a" * 11})).iter_range(0, 1))


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
def test_member_name_is_split_into_key_and_suffix(name: str, parts: tuple[str, str]) -> None:
    assert split_member_name(tarfile.TarInfo(name)) == parts
