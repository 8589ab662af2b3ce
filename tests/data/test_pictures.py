"""Pictures of foreign rows: found, saved out of tables, told apart by content, copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenery import paint

from finesight.data.headers import DamagedPicture
from finesight.data.pictures import Pictures, data_url, named, same_pictures
from finesight.errors import UserError


def test_a_path_starts_at_the_folder_of_the_rows(tmp_path: Path) -> None:
    picture = paint(tmp_path / "in" / "a.png", 40, 20)
    (tmp_path / "rows").mkdir()
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
    with pytest.raises(DamagedPicture, match="the picture of 4 bytes: not a picture") as caught:
        Pictures(tmp_path, tmp_path / "out").take({"bytes": b"text", "path": None})
    assert str(tmp_path) not in str(caught.value)


def test_data_urls_are_saved(tmp_path: Path) -> None:
    data = paint(tmp_path / "a.png").read_bytes()
    (tmp_path / "out").mkdir()
    pictures = Pictures(tmp_path, tmp_path / "out")
    url = data_url(tmp_path / "a.png")
    assert url.startswith("data:image/png;base64,")
    saved = pictures.take(url)
    assert saved == tmp_path / "out" / "pictures" / "000001.png"
    assert saved.read_bytes() == data
    assert pictures.take({"bytes": data}) == saved
    for broken in ("data:image/png;base64,*", "data:image/png,abc", "data:"):
        with pytest.raises(DamagedPicture, match="the data URL"):
            pictures.take(broken)
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(UserError, match="has no place in a data URL"):
        data_url(tmp_path / "b.png")


def test_unchecked_pictures_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "out").mkdir()
    pictures = Pictures(tmp_path, tmp_path / "out", checked=False)
    assert pictures.take("a.png") == tmp_path / "a.png"
    assert pictures.take("in/b.png") == tmp_path / "in" / "b.png"
    assert pictures.take(b"text").read_bytes() == b"text"
    with pytest.raises(DamagedPicture, match="an address on the web"):
        pictures.take("https://example.com/a.png")


def test_a_path_may_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # data/train.jsonl with ./data/train/1.png in it: a tutorial's script ran one folder higher.
    picture = paint(tmp_path / "data" / "train" / "1.png")
    monkeypatch.chdir(tmp_path)
    pictures = Pictures(Path("data"), Path("out"))
    assert pictures.take("./data/train/1.png") == picture
    nearer = paint(tmp_path / "data" / "data" / "train" / "1.png")
    assert Pictures(Path("data"), Path("out")).take("./data/train/1.png") == nearer
    with pytest.raises(DamagedPicture, match="no such picture") as caught:
        pictures.take("train/2.png")
    assert f"{tmp_path / 'data'}, the folder of the data file" in caught.value.expected
    assert f"or at {tmp_path}, the current one" in caught.value.expected


def test_a_path_steps_out_of_where_a_link_leads(tmp_path: Path) -> None:
    picture = paint(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "rows").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "rows")
    assert Pictures(tmp_path / "link", tmp_path).take("../a.png") == picture
    assert Pictures(tmp_path, tmp_path).take("link/../a.png") == picture


@pytest.mark.parametrize("name", ["a\0.png", "a\0/b.png", "A" * 50_000, "a" * 300 + "/b.png"])
def test_what_cannot_be_a_name_is_told_in_few_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedPicture, match="no such picture") as caught:
        Pictures(tmp_path, tmp_path).take(name)
    assert len(caught.value.where) <= 200


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
    out = tmp_path / "out"
    out.mkdir()
    copies = named([one, two], out, out, copy=True)
    assert list(copies.values()) == ["pictures/a.png", "pictures/a-2.png"]
    assert all((out / copy).read_bytes() == path.read_bytes() for path, copy in copies.items())


def test_a_path_as_windows_writes_it(tmp_path: Path) -> None:
    picture = paint(tmp_path / "in" / "a.png")
    pictures = Pictures(tmp_path, tmp_path / "out")
    assert pictures.take("in\\a.png") == pictures.take(".\\in\\a.png") == picture
    own = paint(tmp_path / "in\\a.png", shade=1)
    assert Pictures(tmp_path, tmp_path / "out").take("in\\a.png") == own
