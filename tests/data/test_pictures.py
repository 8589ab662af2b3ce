"""Pictures of foreign rows: found, saved out of tables, told apart by content, copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenery import paint

from finesight.data.headers import DamagedPicture
from finesight.data.pictures import Pictures, copy_all, same_pictures


def test_a_path_starts_at_the_folder_of_the_rows(tmp_path: Path) -> None:
    picture = paint(tmp_path / "in" / "a.png", 40, 20)
    pictures = Pictures(tmp_path / "rows", tmp_path / "out")
    for value in ("../in/a.png", str(picture), f"file://{picture}", {"path": str(picture)}):
        assert pictures.take(value) == picture
    assert pictures.size(picture) == (20, 40)


def test_bytes_are_saved_once_with_the_suffix_of_their_kind(tmp_path: Path) -> None:
    data = paint(tmp_path / "a.png").read_bytes()
    other = paint(tmp_path / "a.jpg", shade=9).read_bytes()
    pictures = Pictures(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    first = pictures.take({"bytes": data, "path": "elsewhere.png"})
    assert pictures.take(data) == first == tmp_path / "out" / "pictures" / "000001.png"
    assert pictures.take(other) == tmp_path / "out" / "pictures" / "000002.jpg"
    assert first.read_bytes() == data


def test_bytes_that_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DamagedPicture, match="not a picture"):
        Pictures(tmp_path, tmp_path / "out").take({"bytes": b"text", "path": None})


def test_equal_content_is_one_picture(tmp_path: Path) -> None:
    first = paint(tmp_path / "a.bmp", shade=1)
    same = paint(tmp_path / "other" / "b.bmp", shade=1)
    differs = paint(tmp_path / "c.bmp", shade=2)
    longer = paint(tmp_path / "d.png", 400, 200)
    link = tmp_path / "e.png"
    link.symlink_to(longer)
    assert first.stat().st_size == differs.stat().st_size
    keys = same_pictures([first, same, differs, longer, link])
    assert keys[first] == keys[same]
    assert keys[longer] == keys[link]
    assert len(set(keys.values())) == 3


def test_copies_of_the_same_name_get_numbers(tmp_path: Path) -> None:
    one, two = paint(tmp_path / "1" / "a.png", shade=1), paint(tmp_path / "2" / "a.png", shade=2)
    (tmp_path / "out").mkdir()
    copies = copy_all([one, two], tmp_path / "out")
    assert [copy.name for copy in copies.values()] == ["a.png", "a-2.png"]
    assert all(copy.read_bytes() == path.read_bytes() for path, copy in copies.items())
