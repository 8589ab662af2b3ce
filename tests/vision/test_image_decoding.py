"""Image decoding: upright RGB on white, or an error."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from each_value import each
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as load_image_hf

from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.vision.image_processing import load_image


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size[::-1] == read_image_size(path)
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@each("turn", range(1, 9))
def test_exif_orientation(tmp_path: Path, turn: int, kind: str) -> None:
    # A bright top left corner of the upright image, 40 wide and 24 high.
    upright = np.zeros((24, 40, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    found = pixels(path)
    assert found.shape == (24, 40, 3)
    assert np.abs(found.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (0,) * (len(mode) - 1) + (255,))
        image.putpixel((1, 0), (0,) * len(mode))
        image.save(path)
    elif mode == "PA":
        path = tmp_path / "clear.gif"
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        image.save(path)
    else:
        # Black and dark pixels, the dark one named as the transparent colour.
        image = Image.new("RGB", (2, 1), (0, 0, 0))
        image.putpixel((1, 0), (5, 5, 5))
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
        clear = {"P": image.getpixel((1, 0)), "L": 5, "RGB": (5, 5, 5)}[mode]
        image.save(path, transparency=clear)
    assert pixels(path).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_partial_transparency_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (200, 0, 100, 128)).save(tmp_path / "half.png")
    found = pixels(tmp_path / "half.png")[0, 0]
    share = 128 / 255
    expected = [200 * share + 255 * (1 - share), 255 * (1 - share), 100 * share + 255 * (1 - share)]
    np.testing.assert_allclose(found, expected, atol=1)


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
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-3.0, 0.0, 3.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 100000, 200000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 257, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[7.0, 7.0, 7.0]], dtype=np.float32), [0, 0, 0]),
    ],
)
def test_high_bit_depth_values_are_scaled(
    tmp_path: Path, values: np.ndarray, expected: list[int]
) -> None:
    Image.fromarray(values).save(tmp_path / "wide.tif")
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


def _save(path: Path, kind: str) -> Path:
    """A ramp of grey, or of colours, with another ramp of alpha."""
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    alpha = np.tile(np.linspace(0, 255, 16).astype(np.uint8)[:, None], (1, 32))
    colour = np.stack([grey, grey[::-1], 255 - grey], -1)
    palette = Image.fromarray(colour).quantize(8)
    images: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "RGB": (Image.fromarray(colour), {}),
        "L": (Image.fromarray(grey), {}),
        "P": (palette, {}),
        "1": (Image.fromarray(grey > 99), {}),
        "RGBA": (Image.fromarray(np.dstack([colour, alpha])), {}),
        "LA": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), {}),
        "P, transparent colour": (palette, {"transparency": 3}),
        "L, transparent grey": (Image.fromarray(grey), {"transparency": 0}),
        "RGB, transparent colour": (Image.fromarray(colour), {"transparency": (0, 0, 255)}),
        "I;16": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
    }
    image, options = images[kind]
    image.save(path, **options)
    return path


# Of the tools in TOOLS: whether each gives the same bytes (docs/en/data.md, "Pixel formats").
@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("RGB", (True, True, True)),
        ("L", (True, True, True)),
        ("P", (True, True, True)),
        ("1", (True, True, True)),
        ("RGBA", (True, True, False)),
        ("LA", (False, True, False)),
        ("P, transparent colour", (False, True, False)),
        ("L, transparent grey", (False, True, False)),
        ("RGB, transparent colour", (False, True, False)),
        ("I;16", (False, False, False)),
    ],
)
def test_conversions_match_reference_tools(
    tmp_path: Path, kind: str, same: tuple[bool, ...]
) -> None:
    path = _save(tmp_path / "image.png", kind)
    ours = pixels(path)
    assert tuple(bool(np.array_equal(tool(path), ours)) for tool in TOOLS) == same


def test_reference_tools_lose_sixteen_bit_range(tmp_path: Path) -> None:
    """All of them clip what is above 255 to white: a ramp of 32 greys becomes two."""
    path = _save(tmp_path / "grey.png", "I;16")
    assert len(np.unique(pixels(path))) == 32
    for tool in TOOLS:
        assert len(np.unique(tool(path))) <= 2


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


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif", "bmp"])
def test_truncated_file_is_distinguished_from_damage(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    full = BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(full, format={"jpg": "jpeg"}.get(kind, kind))
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(full.getvalue()[: full.tell() // 2])
    with pytest.raises(CorruptImageError) as raised:
        load_image(path)
    assert raised.value.where == str(path)
    assert "not an image" not in raised.value.what
    assert ("truncated" in raised.value.what) == (kind != "webp")


def test_flipped_bytes_raise_damaged_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.png"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[3000:3100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(CorruptImageError, match="corrupt"):
        load_image(path)


def test_invalid_and_missing_images(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(CorruptImageError, match="not an image"):
        load_image(tmp_path / "notes.jpg")
    with pytest.raises(CorruptImageError, match="no such image"):
        load_image(tmp_path / "missing.jpg")


def test_oversized_image_is_rejected_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(write_bomb(10_000, 10_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(CorruptImageError, match="10000 x 10000 = 100000000 pixels"):
        load_image(path)
    Image.new("RGB", (20, 10)).save(path)
    with pytest.raises(CorruptImageError, match="20 x 10 = 200 pixels"):
        load_image(path, max_pixels=199)
    assert load_image(path, max_pixels=200).size == (20, 10)


def write_bomb(height: int, width: int) -> bytes:
    """A black one-bit PNG of that size, a few kilobytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + -(-width // 8)) * height, 9)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
