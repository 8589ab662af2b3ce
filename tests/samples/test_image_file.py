"""Image sizes from headers, and files that are rejected before decoding."""

import os
import pickle
from pathlib import Path

import hostile_requests
import pytest
from edge_case_images import build_tiled_tiff
from image_fixtures import write_gray_image
from PIL import Image

from finesight.samples.image_file import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    CorruptImageError,
    ImageTooLargeError,
    decode_image,
    read_image_size,
)
from finesight.vision.image_processing import load_image


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    path = write_gray_image(tmp_path / "a.png", width=300, height=200, gray_level=7)
    path.write_bytes(path.read_bytes()[:60])
    assert read_image_size(path) == (200, 300)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)
    assert path.stat().st_size < 13_000
    with pytest.raises(CorruptImageError, match="100000000 pixels") as caught:
        read_image_size(path)
    assert caught.value.where == str(path)
    assert str(MAX_IMAGE_PIXELS) in caught.value.expected
    assert read_image_size(path, max_pixels=100_000_000) == (10_000, 10_000)
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(CorruptImageError, match="178 million"):
        read_image_size(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no such image"),
        (b"", "an empty file"),
        (b"hello, I am text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_non_image_files_are_rejected(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=what) as caught:
        read_image_size(path)
    assert caught.value.where == str(path)
    assert caught.value.expected
    assert caught.value.remedy


def test_folder_pipe_and_oversized_file_are_rejected(tmp_path):
    with pytest.raises(CorruptImageError, match="a folder"):
        read_image_size(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CorruptImageError, match="a pipe or a device"):
        read_image_size(tmp_path / "pipe.png")
    path = write_gray_image(tmp_path / "a.png")
    os.truncate(path, MAX_IMAGE_BYTES)
    assert read_image_size(path) == (20, 40)
    os.truncate(path, MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageTooLargeError, match=f"{MAX_IMAGE_BYTES + 1} bytes"):
        read_image_size(path)


def test_oversized_tiff_tile_is_rejected(tmp_path: Path) -> None:
    """Ten pixels a side, in one tile of 20,000: unpacked whole it took 400 MB."""
    path = tmp_path / "a.tif"
    path.write_bytes(build_tiled_tiff(10, 10, 20_000, b""))
    with pytest.raises(ImageTooLargeError, match="tiles of 400000000 pixels"):
        read_image_size(path)
    path.write_bytes(build_tiled_tiff(10, 10, 16, b""))
    assert read_image_size(path) == (10, 10)


@pytest.mark.parametrize("position", ["thumbnail", "after the end"])
def test_scan_marks_outside_of_the_image_are_no_scans(tmp_path, position):
    path, marks = tmp_path / "a.jpg", b"\xff\xda" * 30_000
    Image.new("RGB", (64, 48)).save(path)
    content = path.read_bytes()
    if position == "thumbnail":
        content = (
            content[:2] + b"\xff\xef" + (len(marks) + 2).to_bytes(2, "big") + marks + content[2:]
        )
    else:  # such as the video of a motion photo
        content += marks
    path.write_bytes(content)
    assert decode_image(path) == (False, None)
    assert load_image(path).size == (64, 48)


@pytest.mark.parametrize("before", [b"\xff\xff", b"\xff\xd0", b"noise"])
def test_scans_behind_other_bytes_are_counted(tmp_path, before, monkeypatch):
    path = tmp_path / "a.jpg"
    monkeypatch.setattr(hostile_requests, "SIDE", 64)
    content = hostile_requests.make_progressive_jpeg.__wrapped__(3000)
    path.write_bytes(content.replace(b"\xff\xda", before + b"\xff\xda"))
    with pytest.raises(CorruptImageError, match="a JPEG with 3010 scans"):
        load_image(path)


@pytest.mark.parametrize(("scans", "is_valid"), [(0, True), (50, True), (3000, False)])
def test_jpeg_with_too_many_scans_is_not_decoded(tmp_path, scans, is_valid, monkeypatch):
    path = tmp_path / "a.jpg"
    monkeypatch.setattr(hostile_requests, "SIDE", 64)
    path.write_bytes(hostile_requests.make_progressive_jpeg.__wrapped__(scans))
    assert read_image_size(path) == (64, 64)
    for decode in (decode_image, load_image):
        if is_valid:
            decode(path)
            continue
        with pytest.raises(CorruptImageError, match=f"a JPEG with {scans + 10} scans") as caught:
            decode(path)
        assert caught.value.where == str(path)


def test_damaged_image_error_is_picklable(tmp_path: Path) -> None:
    with pytest.raises(CorruptImageError) as caught:
        read_image_size(tmp_path / "missing.png")
    returned = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(returned, CorruptImageError)
    assert str(returned) == str(caught.value)
