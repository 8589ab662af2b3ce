"""Sizes of pictures from their headers, and what is refused before a pixel is decoded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from odd_pictures import tiled_tiff
from PIL import Image
from scenery import paint

from finesight.data.headers import (
    MAX_BYTES,
    MAX_PIXELS,
    DamagedPicture,
    TooLarge,
    picture_size,
)


def test_height_comes_first(tmp_path: Path) -> None:
    assert picture_size(paint(tmp_path / "a.png", width=40, height=20)) == (20, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_turn_swaps_the_sides(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert picture_size(path) == (40, 20)


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", width=300, height=200, shade=7)
    path.write_bytes(path.read_bytes()[:60])
    assert picture_size(path) == (200, 300)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_small_file_of_many_pixels(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)
    assert path.stat().st_size < 13_000
    with pytest.raises(DamagedPicture, match="100000000 pixels") as caught:
        picture_size(path)
    assert caught.value.where == str(path)
    assert str(MAX_PIXELS) in caught.value.expected
    assert picture_size(path, max_pixels=100_000_000) == (10_000, 10_000)


def test_more_pixels_than_pillow_opens(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(DamagedPicture, match="178 million"):
        picture_size(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no such picture"),
        (b"", "an empty file"),
        (b"hello, I am text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedPicture, match=what) as caught:
        picture_size(path)
    assert caught.value.where == str(path)
    assert caught.value.expected
    assert caught.value.remedy


def test_a_folder_or_a_pipe_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(DamagedPicture, match="a folder"):
        picture_size(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DamagedPicture, match="a pipe or a device"):
        picture_size(tmp_path / "pipe.png")


def test_damage_survives_the_way_back_from_a_worker(tmp_path: Path) -> None:
    with pytest.raises(DamagedPicture) as caught:
        picture_size(tmp_path / "missing.png")
    returned = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(returned, DamagedPicture)
    assert str(returned) == str(caught.value)


def test_a_tile_larger_than_any_picture(tmp_path: Path) -> None:
    """Ten pixels a side, in one tile of 20,000: unpacked whole it took 400 MB."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiled_tiff(10, 10, 20_000, b""))
    with pytest.raises(TooLarge, match="tiles of 400000000 pixels"):
        picture_size(path)
    path.write_bytes(tiled_tiff(10, 10, 16, b""))
    assert picture_size(path) == (10, 10)


def test_a_file_longer_than_any_picture(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png")
    os.truncate(path, MAX_BYTES)
    assert picture_size(path) == (20, 40)
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(TooLarge, match=f"{MAX_BYTES + 1} bytes"):
        picture_size(path)
