"""Images of foreign rows: resolved, saved from tables, distinguished by content, copied."""

import base64
import os
from pathlib import Path

import pytest
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.files.bounded_files import SpecialFileError
from finesight.ingest import name_template
from finesight.ingest.image_resolver import ImageNames, ImageResolver, encode_data_url
from finesight.samples.image_file import CorruptImageError, is_image_value


def test_path_is_relative_to_row_folder(tmp_path: Path) -> None:
    image = write_gray_image(tmp_path / "in" / "a.png", 40, 20)
    (tmp_path / "rows").mkdir()
    images = ImageResolver(tmp_path / "rows", tmp_path / "out")
    for value in ("../in/a.png", str(image), f"file://{image}", {"path": str(image)}):
        assert images.resolve(value) == image
    assert images.image_size(image) == (20, 40)


def test_data_urls_are_saved(tmp_path: Path) -> None:
    data = write_gray_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "out").mkdir()
    images = ImageResolver(tmp_path, tmp_path / "out")
    url = encode_data_url(tmp_path / "a.png")
    assert url.startswith("data:image/png;base64,")
    saved = images.resolve(url)
    assert saved == tmp_path / "out" / "images" / "000001.png"
    assert saved.read_bytes() == data
    assert images.resolve({"bytes": data}) == images.resolve(url.removeprefix("data:")) == saved
    for broken in ("data:image/png;base64,*", "data:image/png,abc", "data:"):
        with pytest.raises(CorruptImageError, match="the data URL"):
            images.resolve(broken)
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(UserError, match="data URLs do not support"):
        encode_data_url(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "avif"])
def test_base64_is_saved(tmp_path: Path, suffix: str) -> None:
    file = write_gray_image(tmp_path / f"a.{suffix}", 64, 64)
    text = base64.b64encode(file.read_bytes()).decode()
    (tmp_path / "out").mkdir()
    images = ImageResolver(tmp_path, tmp_path / "out")
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    url_safe = text.translate(str.maketrans("+/", "-_"))
    for value in (text, f"{lines}\n", text.rstrip("="), url_safe, {"bytes": file.read_bytes()}):
        assert images.resolve(value) == tmp_path / "out" / "images" / f"000001.{suffix}"
        assert is_image_value(value)
    with pytest.raises(CorruptImageError, match=r"base64|not an image|cannot be opened"):
        images.resolve(text[:49])
    name = "Qk_images/of/a/folder/with/many/parts/a.jpg"  # begins like a BMP file in base64
    with pytest.raises(CorruptImageError, match="no such image"):
        images.resolve(name)


def test_unchecked_images_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "out").mkdir()
    images = ImageResolver(tmp_path, tmp_path / "out", validate=False)
    assert images.resolve("a.png") == tmp_path / "a.png"
    assert images.resolve("in/b.png") == tmp_path / "in" / "b.png"
    assert images.resolve(b"text").read_bytes() == b"text"
    with pytest.raises(CorruptImageError, match="a web URL"):
        images.resolve("https://example.com/a.png")


def test_path_may_be_relative_to_working_directory(tmp_path, monkeypatch):
    # data/train.jsonl with ./data/train/1.png in it: a tutorial's script ran one folder higher.
    image = write_gray_image(tmp_path / "data" / "train" / "1.png")
    monkeypatch.chdir(tmp_path)
    images = ImageResolver(Path("data"), Path("out"))
    assert images.resolve("./data/train/1.png") == image
    nearer = write_gray_image(tmp_path / "data" / "data" / "train" / "1.png")
    assert ImageResolver(Path("data"), Path("out")).resolve("./data/train/1.png") == nearer
    with pytest.raises(CorruptImageError, match="no such image") as caught:
        images.resolve("train/2.png")
    assert f"{tmp_path / 'data'}, the folder of the data file" in caught.value.expected
    assert f"or at {tmp_path}, the current one" in caught.value.expected


@pytest.mark.parametrize("name", ["a\0.png", "a\0/b.png", "A" * 50_000, "a" * 300 + "/b.png"])
def test_invalid_file_name_error_is_short(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptImageError, match="no such image") as caught:
        ImageResolver(tmp_path, tmp_path).resolve(name)
    assert len(caught.value.where) <= 200


def test_equal_file_names_get_suffixes(tmp_path: Path) -> None:
    one, two = (
        write_gray_image(tmp_path / "1" / "a.png", gray_level=1),
        write_gray_image(tmp_path / "2" / "a.png", gray_level=2),
    )
    out = tmp_path / "out"
    out.mkdir()
    names = ImageNames(out, out, copy=True)
    copies = {path: names.name(str(path)) for path in (one, two)}
    names.copy(map(str, copies))
    assert list(copies.values()) == ["images/a.png", "images/a-2.png"]
    assert all((out / copy).read_bytes() == path.read_bytes() for path, copy in copies.items())


def test_windows_path_separators_and_symlinks(tmp_path):
    image = write_gray_image(tmp_path / "in" / "a.png")
    images = ImageResolver(tmp_path, tmp_path / "out")
    assert images.resolve("in\\a.png") == images.resolve(".\\in\\a.png") == image
    own = write_gray_image(tmp_path / "in\\a.png", gray_level=1)
    assert ImageResolver(tmp_path, tmp_path / "out").resolve("in\\a.png") == own
    # The parent of a link is that of its target.
    (tmp_path / "in" / "rows").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in" / "rows")
    assert ImageResolver(tmp_path / "link", tmp_path).resolve("../a.png") == image
    assert ImageResolver(tmp_path, tmp_path).resolve("link/../a.png") == image


def test_identifier_without_suffix_names_the_template(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_gray_image(tmp_path / "train" / "0a1b.jpg")
    resolver = ImageResolver(tmp_path, tmp_path / "out")
    with pytest.raises(CorruptImageError) as caught:
        resolver.resolve("0a1b")
    assert 'images: {template: "train/{COLUMN}.jpg"}' in str(caught.value.remedy)
    with pytest.raises(CorruptImageError) as caught:
        resolver.resolve("0a1c")
    assert str(caught.value.remedy).startswith("correct the path")


@pytest.mark.parametrize(
    ("file", "value", "template"),
    [
        ("clips/clip70.mp4", 70, 'videos: {template: "clips/clip{COLUMN}.mp4"}'),
        ("clips/70.webm", "70", 'videos: {template: "clips/{COLUMN}.webm"}'),
        ("scans/s{a}_0070.png", 70, 'images: {template: "scans/s{{a}}_{COLUMN:04}.png"}'),
        ("scans/a/front.png", "a/front.png", 'images: {template: "scans/{COLUMN}"}'),
        ("scans/a/front.png", "a/front", 'images: {template: "scans/{COLUMN}.png"}'),
    ],
)
def test_incomplete_name_names_the_template(
    tmp_path: Path, file: str, value: object, template: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    resolver = ImageResolver(tmp_path, tmp_path / "out")
    for resolve in (resolver.resolve, resolver.resolve_frames):
        with pytest.raises(UserError) as caught:
            resolve(value)
        assert f"(--mapping) with {template}, for the column" in str(caught.value.remedy)


def test_relative_path_names_the_folder_in_which_it_starts(tmp_path: Path, monkeypatch) -> None:
    image = write_gray_image(tmp_path / "scans" / "a" / "front.png")
    with pytest.raises(CorruptImageError) as caught:
        ImageResolver(tmp_path, tmp_path / "out").resolve("a/front.png")
    assert str(caught.value.remedy).startswith("change to the folder scans, in which the paths")
    monkeypatch.chdir(tmp_path / "scans")
    assert ImageResolver(tmp_path, tmp_path / "out").resolve("a/front.png") == image


@pytest.mark.parametrize(("name", "kind"), [("a.png", "image"), ("clips/a.mp4", "video")])
def test_missing_file_is_named_by_its_kind(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(CorruptImageError) as caught:
        ImageResolver(tmp_path, tmp_path / "out").resolve(name)
    assert str(caught.value.what) == f"no such {kind}"
    assert f"the folder of the data file or of its {kind}s" in caught.value.expected


def test_number_within_another_number_is_no_name(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "scans" / "s170.png")
    with pytest.raises(UserError) as caught:
        ImageResolver(tmp_path, tmp_path / "out").resolve(70)
    assert str(caught.value.remedy) == "correct the row, or name another column"


@pytest.mark.parametrize("url", ["s3://bucket/a.jpg", "gs://bucket/a.jpg"])
def test_file_of_object_storage_is_to_be_downloaded(tmp_path: Path, url: str) -> None:
    with pytest.raises(CorruptImageError) as caught:
        ImageResolver(tmp_path, tmp_path / "out").resolve(url)
    assert str(caught.value.remedy).startswith("download the files")
    with pytest.raises(CorruptImageError) as caught:
        ImageResolver(tmp_path, tmp_path / "out").resolve(url.replace("s3", "https"))
    assert ("--allow-host" in str(caught.value.remedy)) == url.startswith("s3")


def test_name_is_searched_in_all_folders(tmp_path: Path) -> None:
    first = write_gray_image(tmp_path / "part1" / "raw" / "p1.png")
    second = write_gray_image(tmp_path / "part2" / "raw" / "p2.png")
    other = write_gray_image(tmp_path / "part2" / "raw" / "sub" / "p1.jpg")
    images = ImageResolver(tmp_path, tmp_path / "out")
    with pytest.raises(CorruptImageError) as caught:
        images.resolve("p2.png")
    assert 'images: {template: "**/{COLUMN}"}' in str(caught.value.remedy)
    assert images.resolve("**/p1.png") == first
    assert images.resolve("**/p2.png") == second
    assert images.resolve("**/raw/sub/p1.jpg") == other
    with pytest.raises(CorruptImageError, match="no such image"):
        images.resolve("**/aw/p2.png")
    write_gray_image(tmp_path / "copies" / "p1.png")
    images = ImageResolver(tmp_path, tmp_path / "out")
    with pytest.raises(CorruptImageError, match=r"2 files of this name: copies/p1.png"):
        images.resolve("**/p1.png")
    assert images.resolve("**/part1/raw/p1.png") == first


def test_suggestion_searches_the_first_files_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(name_template, "MAX_SUGGESTED_FILES", 2)
    for number in range(3):
        write_gray_image(tmp_path / "part" / "raw" / f"p{number}.png")
    images = ImageResolver(tmp_path, tmp_path / "out")
    remedies: list[str] = []
    for name in ("p1.png", "p2.png"):
        with pytest.raises(CorruptImageError) as caught:
            images.resolve(name)
        remedies.append(str(caught.value.remedy))
    assert ["**/" in remedy for remedy in remedies] == [True, False]
    assert images.resolve("**/p2.png").name == "p2.png"


def test_named_pipe_does_not_hide_a_missing_image(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "part" / "raw" / "p1.png")
    os.mkfifo(tmp_path / "part" / "pipe")
    images = ImageResolver(tmp_path, tmp_path / "out")
    with pytest.raises(CorruptImageError, match="no such image") as caught:
        images.resolve("p1.png")
    assert "**/" not in str(caught.value.remedy)
    with pytest.raises(SpecialFileError):
        images.resolve("**/p1.png")


def test_search_in_all_folders_stays_inside_of_an_untrusted_source(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "other" / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    images = ImageResolver(tmp_path / "in", tmp_path / "out", allowed_root=tmp_path / "in")
    with pytest.raises(CorruptImageError, match="no such image in the source"):
        images.resolve("**/a.png")
