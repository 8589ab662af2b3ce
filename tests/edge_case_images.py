"""More than 300 unusual images with the expected result: trained on, or rejected.

`python tests/edge_case_images.py FOLDER` writes the images, encodes each as training does, and
prints a JSON line for each: expected result, result, reason, and growth of the peak memory.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
FILE_SUFFIXES = {form: form.lower() for form in (*FORMATS, "MPO")}
FILE_SUFFIXES |= {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
HIGH_DEPTH_DTYPES = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": np.dtype(">u2")}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NO_IMAGES = {
    "text.jpg": b"hello",
    "page.png": b"<!DOCTYPE html><html></html>",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "document.jpg": b"%PDF-1.7\n",
    "archive.png": b"PK\x03\x04" + bytes(60),
    "icon.png": b"\0\0\1\0\1\0\1\1\0\0\1\0\x20\0\x30\0\0\0\x16\0\0\0" + bytes(48),
    "zeros.png": bytes(5000),
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


class EdgeCaseImage(NamedTuple):
    """The file name of an image, its content and the expected result."""

    name: str
    content: bytes
    expected: Literal["taken", "refused"] = "taken"


def rejected(name: str, content: bytes) -> EdgeCaseImage:
    return EdgeCaseImage(name, content, "refused")


def make_noise_image(width: int = 40, height: int = 24) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode_image(image: Image.Image, form: str, **settings: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def encode_noise(stem: str, form: str, **settings: Any) -> EdgeCaseImage:
    content = encode_image(make_noise_image(), form, **settings)
    return EdgeCaseImage(f"{stem}.{FILE_SUFFIXES[form]}", content)


def list_modes() -> Iterator[EdgeCaseImage]:
    """Every mode in every format that can hold it."""
    for mode, form in itertools.product((*MODES, *HIGH_DEPTH_DTYPES), FORMATS):
        try:
            content = encode_image(_make_mode_image(mode), form)
        except (OSError, ValueError, KeyError):  # Pillow's writers refuse in all three ways
            continue
        # Pillow writes YCbCr whole, and does not say so: by its own words such a TIFF has half the
        # colours, and other lengths.
        make = rejected if (mode, form) == ("YCbCr", "TIFF") else EdgeCaseImage
        yield make(f"mode-{mode.replace(';', '-')}.{FILE_SUFFIXES[form]}", content)


def _make_mode_image(mode: str) -> Image.Image:
    noise = make_noise_image()
    if mode in HIGH_DEPTH_DTYPES:
        return Image.fromarray(np.arange(40 * 24).reshape(24, 40).astype(HIGH_DEPTH_DTYPES[mode]))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(noise, srgb, lab, outputMode="LAB")
        assert image is not None
        return image
    return noise.convert({"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)


def list_metadata() -> Iterator[EdgeCaseImage]:
    """All EXIF orientations, EXIF data that is none, and color profiles, which are not applied."""
    for form, turn in itertools.product(("JPEG", "PNG", "WEBP", "TIFF", "AVIF"), range(10)):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield encode_noise(f"turn-{turn}", form, exif=exif)
    for form in ("JPEG", "PNG", "WEBP"):
        broken = encode_noise("exif-of-nothing", form, exif=b"Exif\0\0" + b"\xff" * 60)
        # Pillow looks over it in a JPEG alone.
        yield broken if form == "JPEG" else broken._replace(expected="refused")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("torn", srgb[:200]), ("nonsense", b"\xff" * 5000)):
        for form in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield encode_noise(f"icc-{name}", form, icc_profile=profile)


def list_shapes() -> Iterator[EdgeCaseImage]:
    """From one pixel to lines of 20,000; over 200 to 1 the families refuse."""
    sizes = ((1, 1), (1, 200), (200, 1), (1, 201), (1, 20_000), (20_000, 1))
    for (width, height), form in itertools.product(sizes, FORMATS):
        if form in ("WEBP", "AVIF") and max(width, height) > 16_383:
            continue  # more than these formats can hold
        make = rejected if max(width, height) > 200 * min(width, height) else EdgeCaseImage
        content = encode_image(Image.new("RGB", (width, height)), form)
        yield make(f"line-{width}x{height}.{FILE_SUFFIXES[form]}", content)


def list_wrong_contents() -> Iterator[EdgeCaseImage]:
    """Truncated files, formats with the suffix of another one, and files that are no images."""
    for number, form in enumerate(FORMATS):
        content = encode_image(make_noise_image(), form)
        for tenth in range(10):
            yield rejected(
                f"cut-{tenth}.{FILE_SUFFIXES[form]}", content[: len(content) * tenth // 10]
            )
        ending = [*(FILE_SUFFIXES[other] for other in FORMATS), "txt"][number + 1]
        yield EdgeCaseImage(f"{form.lower()}-as.{ending}", content)
    yield EdgeCaseImage("no-ending", encode_image(make_noise_image(), "PNG"))
    yield from (rejected(f"no-image-{name}", content) for name, content in NO_IMAGES.items())


def list_animated() -> Iterator[EdgeCaseImage]:
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        yield encode_noise("moving", form, save_all=True, append_images=frames)
    clear = [Image.new("RGBA", (40, 24), (shade, 0, 0, 9)) for shade in (0, 90, 180)]
    for form in ("GIF", "PNG", "WEBP"):
        content = encode_image(clear[0], form, save_all=True, append_images=clear[1:], disposal=2)
        yield EdgeCaseImage(f"moving-clear.{FILE_SUFFIXES[form]}", content)


def list_rare_encodings() -> Iterator[EdgeCaseImage]:
    """High bit depths, and seldom used encodings."""
    wide = np.random.default_rng(0).integers(0, 65536, (24, 40), dtype=np.uint16)
    for form in ("PNG", "TIFF", "JPEG2000"):
        content = encode_image(Image.fromarray(wide), form)
        yield EdgeCaseImage(f"grey-16.{FILE_SUFFIXES[form]}", content)
    yield EdgeCaseImage("grey-16.pgm", b"P5 40 24 65535\n" + wide.astype(">u2").tobytes())
    colour = np.repeat(wide[:, :, None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    yield EdgeCaseImage("colour-16.png", build_png(40, 24, zlib.compress(rows), bits=16))
    for name, values in (("nan", [np.nan] * 4), ("inf", [np.inf, -np.inf, np.nan, 0])):
        yield EdgeCaseImage(f"{name}.pfm", b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", *values))
    yield encode_noise("progressive", "JPEG", progressive=True)
    yield encode_noise("restarts", "JPEG", restart_marker_rows=1)
    yield encode_noise("lossless", "WEBP", lossless=True)
    yield encode_noise("interlaced", "GIF", interlace=True)
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        yield encode_noise(packing, "TIFF", compression=packing)
    bits = make_noise_image().convert("1")
    for packing in ("group3", "group4", "tiff_ccitt"):
        yield EdgeCaseImage(f"{packing}.tif", encode_image(bits, "TIFF", compression=packing))
    yield EdgeCaseImage("plain.ppm", b"P3 2 1 255\n" + b"9 " * 6)
    longer = encode_image(make_noise_image(), "PNG") + bytes(100_000)
    yield EdgeCaseImage("more-than-its-pixels.png", longer)


def build_png(width: int, height: int, rows: bytes, *others: bytes, bits: int = 8) -> bytes:
    """Make an RGB PNG with these packed rows, and other chunks before them."""
    header = build_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    end = build_png_chunk(b"IEND", b"")
    return b"".join([PNG_SIGNATURE, header, *others, build_png_chunk(b"IDAT", rows), end])


def build_png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_tiled_tiff(width: int, height: int, side: int, tile: bytes) -> bytes:
    """A grey TIFF in one tile of `side` x `side`, deflated."""
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    entries |= {322: side, 323: side, 324: 8, 325: len(tile)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    at = 8 + len(tile)
    return b"II*\0" + struct.pack("<I", at) + tile + struct.pack("<H", 10) + table + bytes(4)


def list_huge_headers() -> Iterator[EdgeCaseImage]:
    """Headers that name more pixels than there are bytes for."""
    zeros = zlib.compress(bytes(100 << 20), 9)
    for width, height in ((8001, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        yield rejected(f"pixels-{width}x{height}.png", build_png(width, height, zeros))
    small = encode_image(Image.new("RGB", (8, 8)), "JPEG")
    sides = struct.pack(">HH", 8, 8)
    assert small.count(sides) == 1
    for name, value in (("wide", (8, 65_000)), ("all", (65_000, 65_000)), ("none", (0, 8))):
        yield rejected(f"pixels-{name}.jpg", small.replace(sides, struct.pack(">HH", *value)))
    for name, screen, frame in (
        ("frame", (1, 1), (60_000, 60_000)),
        ("screen", (60_000, 60_000), (1, 1)),
        ("nothing", (0, 0), (0, 0)),
        ("no-frame", (1, 1), (0, 0)),
    ):
        head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        body = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\2\x44\1\0;"
        yield rejected(f"pixels-{name}.gif", head + body)
    for name, width, height in (("many", 60_000, 60_000), ("upside", 1, -(2**31)), ("none", 0, 0)):
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        content = b"BM" + struct.pack("<IHHI", 200, 0, 0, 54) + info + bytes(100)
        yield rejected(f"pixels-{name}.bmp", content)
    for name, size in (("many", b"60000 60000"), ("none", b"0 5"), ("minus", b"-5 5")):
        yield rejected(f"pixels-{name}.ppm", b"P6 " + size + b" 255\n" + bytes(99))
    yield rejected("digits.ppm", b"P6 " + b"9" * 5000 + b" 1 255\n")
    rotated = make_noise_image().rotate(9)
    animated = encode_image(make_noise_image(), "WEBP", save_all=True, append_images=[rotated])
    yield rejected(
        "pixels.webp", _overwrite(animated, b"VP8X", 12, struct.pack("<I", 16_383)[:3] * 2)
    )
    stream = encode_image(make_noise_image(), "JPEG2000")
    stream = _overwrite(stream, b"\xff\x51", 6, struct.pack(">II", 30_000, 30_000))
    yield rejected("pixels.jp2", stream)
    yield rejected("pixels.j2k", stream[stream.index(b"\xff\x51") - 2 :])
    avif = encode_image(make_noise_image(), "AVIF")
    yield rejected("pixels.avif", _overwrite(avif, b"ispe", 8, struct.pack(">II", 2**31, 2**31)))
    small_tile = zlib.compress(bytes(256))
    yield EdgeCaseImage("one-tile.tif", build_tiled_tiff(10, 10, 16, small_tile))
    yield rejected("wide-tile.tif", build_tiled_tiff(10, 10, 20_000, zeros))
    yield rejected("wide-strip.tif", build_tiled_tiff(60_000, 60_000, 16, zeros))
    yield from list_long_headers(zeros)


def _overwrite(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """Replace the bytes at an offset from the first occurrence of a mark."""
    at = content.index(mark) + offset
    return content[:at] + value + content[at + len(value) :]


def list_long_headers(zeros: bytes) -> Iterator[EdgeCaseImage]:
    """Yield large data that is no image before a small one; `zeros` unpacks to 100 MB."""
    row = zlib.compress(bytes(8 * 25))
    for kind, start in ((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
        content = build_png(8, 8, row, build_png_chunk(kind, start + zeros))
        yield rejected(f"{kind.decode()}-that-unpacks.png", content)
    yield EdgeCaseImage("rows-that-unpack.png", build_png(8, 8, zeros))
    words = [build_png_chunk(b"tEXt", b"k%d\0" % number + b"x" * 10_000) for number in range(100)]
    yield EdgeCaseImage("many-words.png", build_png(8, 8, row, *words))
    small = encode_image(Image.new("RGB", (8, 8)), "JPEG")
    for name, marker in (("comments", b"\xff\xfe"), ("applications", b"\xff\xed")):
        segment = marker + struct.pack(">H", 65_000) + b"x" * 64_998
        yield EdgeCaseImage(f"{name}.jpg", small[:2] + segment * 50 + small[2:])
    yield rejected("padded.jpg", b"\xff\xd8" + b"\xff" * 300_000)


def list_edge_case_images() -> list[EdgeCaseImage]:
    """All of them; names differ."""
    groups = (list_modes, list_metadata, list_shapes, list_wrong_contents)
    groups += (list_animated, list_rare_encodings, list_huge_headers)
    found = [odd for group in groups for odd in group()]
    assert len({odd.name for odd in found}) == len(found), "two images of one name"
    return found


def write_samples(folder: Path, odds: Iterable[EdgeCaseImage], name: str) -> Path:
    """Write the images, and a data file with a sample of each, whose id is the image name."""
    lines = []
    for odd in odds:
        (folder / odd.name).write_bytes(odd.content)
        question = [{"type": "image", "image": odd.name}, {"type": "text", "text": "Which?"}]
        turns = {"user": question, "assistant": "red"}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        lines.append(json.dumps({"id": odd.name, "messages": messages}) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def main() -> None:
    from tiny_model import create_tiny_model

    from finesight.check.image_catalog import inspect_images
    from finesight.config import PixelRange, TrainFileSettings
    from finesight.data.corpus import load_corpus
    from finesight.data.image_header import CorruptImageError
    from finesight.encode.renderer import NativeRenderer
    from finesight.model_folder import ModelFolder

    folder = Path(sys.argv[1])
    create_tiny_model(folder / "tiny")
    renderer = NativeRenderer(
        ModelFolder(folder / "tiny"), PixelRange(min_pixels=784, max_pixels=7056)
    )
    odds = list_edge_case_images()
    corpus = load_corpus((TrainFileSettings(path=write_samples(folder, odds, "odd.jsonl")),))

    def peak() -> int:
        # In contrast to ru_maxrss, VmHWM does not include the peak of the parent process.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

    for index, odd in enumerate(odds):
        before, reason = peak(), ""
        try:
            encoded = renderer.encode(corpus.read_validated(index))
            assert len(encoded.patches_ND), odd.name
        except CorruptImageError as error:
            reason = str(error).splitlines()[0]
        (content,) = inspect_images([str(folder / odd.name)])
        result = {"name": odd.name, "fate": odd.expected, "reason": reason}
        result |= {"fault": content.issue_code, "megabytes": peak() - before}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
