"""Image decoding: upright RGB on white, or an error."""

from pathlib import Path

import numpy as np
import pytest
from image_fixtures import encode_image, make_noise_image, write_noise_image
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as load_image_hf

from finesight.samples.image_file import CorruptImageError, read_image_size
from finesight.vision.image_processing import load_image


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size[::-1] == read_image_size(path)
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path: Path, kind: str) -> None:
    # A bright top left corner of the upright image, 40 wide and 24 high.
    upright = np.zeros((24, 40, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    turned = upright.transpose(1, 0, 2)
    stored = [
        *(upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]),
        *(turned, turned[::-1], turned[::-1, ::-1], turned[:, ::-1]),
    ]
    for turn, values in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"{turn}.{kind}"
        Image.fromarray(np.ascontiguousarray(values)).save(path, exif=exif)
        found = pixels(path)
        assert found.shape == (24, 40, 3), turn
        assert np.abs(found.astype(int) - upright).mean() < 4, turn


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_sixteen_bit_images_are_scaled(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 300).round().astype(np.uint16)[None]
    path = tmp_path / f"ramp.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 300 1 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(path)
    expected = np.rint(ramp / 257.0)
    np.testing.assert_array_equal(pixels(path)[:, :, 0], expected)
    assert (np.ptp(pixels(path), axis=2) == 0).all()


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([-3.0, 0.0, 3.0], np.float32, [0, 128, 255]),
        ([0, 100000, 200000], np.int32, [0, 128, 255]),
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([7.0, 7.0, 7.0], np.float32, [0, 0, 0]),
    ],
)
def test_high_bit_depth_values_are_scaled(tmp_path, values, kind, expected):
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / "wide.tif")
    assert pixels(tmp_path / "wide.tif")[0, :, 0].tolist() == expected


def _qwen_vl_utils(path: Path) -> np.ndarray:
    """The conversion of qwen-vl-utils 0.0.9 to 0.0.14: only RGBA is laid on white."""
    image = Image.open(path)
    if image.mode != "RGBA":
        return np.asarray(image.convert("RGB"))
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return np.asarray(white)


def _transformers(path: Path) -> np.ndarray:
    """The image processors of transformers from 5.21 on, given an image of Pillow."""
    return np.asarray(convert_to_rgb(Image.open(path), return_numpy=True))


def _transformers_by_path(path: Path) -> np.ndarray:
    """transformers given a path or an address; as its image processors before 5.21."""
    return np.asarray(load_image_hf(str(path)))


TOOLS = (_qwen_vl_utils, _transformers, _transformers_by_path)
GREY = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
ALPHA = np.tile(np.linspace(0, 255, 16).astype(np.uint8)[:, None], (1, 32))
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
PALETTE = Image.fromarray(COLOUR).quantize(8)
# Image, transparent colour, and whether each tool gives the same bytes (docs/en/data.md, "Pixel
# formats").
CONVERSIONS = {
    "RGB": (Image.fromarray(COLOUR), None, (True, True, True)),
    "L": (Image.fromarray(GREY), None, (True, True, True)),
    "P": (PALETTE, None, (True, True, True)),
    "1": (Image.fromarray(GREY > 99), None, (True, True, True)),
    "RGBA": (Image.fromarray(np.dstack([COLOUR, ALPHA])), None, (True, True, False)),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), None, (False, True, False)),
    "transparent index": (PALETTE, 3, (False, True, False)),
    "transparent grey": (Image.fromarray(GREY), 0, (False, True, False)),
    "transparent colour": (Image.fromarray(COLOUR), (0, 0, 255), (False, True, False)),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), None, (False, False, False)),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_conversions_match_reference_tools(tmp_path: Path, kind: str) -> None:
    image, transparency, same = CONVERSIONS[kind]
    path = tmp_path / "image.png"
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    ours = pixels(path)
    assert tuple(bool(np.array_equal(tool(path), ours)) for tool in TOOLS) == same
    if kind == "I;16":
        # All tools clip what is above 255 to white: a ramp of 32 greys becomes two.
        assert len(np.unique(ours)) == 32
        assert all(len(np.unique(tool(path))) <= 2 for tool in TOOLS)


def test_cmyk(tmp_path: Path) -> None:
    # Pillow writes CMYK JPEG the way Adobe does, inverted and marked as such.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    for name in ("red.jpg", "red.tif"):
        np.testing.assert_allclose(pixels(tmp_path / name)[8, 8], [255, 0, 0], atol=6)


def test_one_bit_and_palette_images(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png")[0, :, 1].tolist() == [255, 0]
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png")
    assert pixels(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(path)[4, 4], [255, 0, 0], atol=3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_truncated_file_is_distinguished_from_damage(tmp_path: Path, kind: str) -> None:
    full, path = encode_image(make_noise_image(64, 64), kind), tmp_path / f"cut.{kind}"
    path.write_bytes(full[: len(full) // 2])
    with pytest.raises(CorruptImageError) as raised:
        load_image(path)
    assert raised.value.where == str(path)
    assert "not an image" not in raised.value.what
    assert ("truncated" in raised.value.what) == (kind != "webp")


def test_invalid_missing_and_damaged_images(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    write_noise_image(tmp_path / "flipped.png", 64, 64)
    data = bytearray((tmp_path / "flipped.png").read_bytes())
    data[3000:3100] = bytes(100)
    (tmp_path / "flipped.png").write_bytes(data)
    for name, message in (
        ("notes.jpg", "not an image"),
        ("missing.jpg", "no such image"),
        ("bomb.png", "10000 x 10000 = 100000000 pixels"),
        ("flipped.png", "corrupt"),
    ):
        with pytest.raises(CorruptImageError, match=message):
            load_image(tmp_path / name)
    write_noise_image(tmp_path / "small.png", 64, 64)
    with pytest.raises(CorruptImageError, match="64 x 64 = 4096 pixels"):
        load_image(tmp_path / "small.png", max_pixels=4095)
    assert load_image(tmp_path / "small.png", max_pixels=4096).size == (64, 64)
