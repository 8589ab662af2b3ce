"""More than 300 unusual images with the expected result: trained on, or rejected.

`python tests/edge_case_images.py FOLDER` writes the images, encodes each as training does, and
prints a JSON line for each: expected result, result, reason, and growth of the peak memory.
"""

import json
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from image_fixtures import encode_image, make_noise_image
from mutations import read_peak_memory
from PIL import Image, ImageCms

FILE_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"} | {
    form: form.lower() for form in ("PNG", "WEBP", "BMP", "GIF", "PPM", "AVIF")
}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
HIGH_DEPTH_DTYPES = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": np.dtype(">u2")}
NamedContents = Iterator[tuple[str, bytes]]


class EdgeCaseImage(NamedTuple):
    """The file name of an image, its content and the expected result."""

    name: str
    content: bytes
    is_valid: bool = True


NOISE = make_noise_image(40, 24)


def encode_noise(form: str, **settings: Any) -> bytes:
    return encode_image(NOISE, form, **settings)


def convert_mode(mode: str) -> Image.Image:
    if mode in HIGH_DEPTH_DTYPES:
        return Image.fromarray(np.arange(960).reshape(24, 40).astype(HIGH_DEPTH_DTYPES[mode]))
    if mode != "LAB":
        between = {"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
        return NOISE.convert(between).convert(mode)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(NOISE, srgb, lab, outputMode="LAB")
    assert converted is not None
    return converted


def iter_valid() -> NamedContents:
    """Yield unusual images that can be decoded, in groups."""
    for mode, (form, suffix) in product((*MODES, *HIGH_DEPTH_DTYPES), FILE_SUFFIXES.items()):
        try:
            content = encode_image(convert_mode(mode), form)
        except (OSError, ValueError, KeyError):  # Pillow cannot write this mode in this format
            continue
        # Pillow writes YCbCr in a TIFF without subsampling, but with tags of a subsampled image.
        if (mode, form) != ("YCbCr", "TIFF"):
            yield f"mode-{mode.replace(';', '-')}.{suffix}", content
    # The eight EXIF orientations and two invalid ones; invalid EXIF data in a JPEG.
    for form, orientation in product(("JPEG", "PNG", "WEBP", "TIFF", "AVIF"), range(10)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"turn-{orientation}.{FILE_SUFFIXES[form]}", encode_noise(form, exif=exif)
    yield "exif-of-nothing.jpg", encode_noise("JPEG", exif=b"Exif\0\0" + b"\xff" * 60)
    # Formats with the suffix of another one.
    suffixes = (*list(FILE_SUFFIXES.values())[1:], "txt")
    for form, suffix in zip(FILE_SUFFIXES, suffixes, strict=True):
        yield f"{form.lower()}-as.{suffix}", encode_noise(form)
    yield "no-ending", encode_noise("PNG")
    # Animations.
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        content = encode_image(frames[0], form, save_all=True, append_images=frames[1:])
        yield f"moving.{FILE_SUFFIXES.get(form, 'mpo')}", content
    clear = [Image.new("RGBA", (40, 24), (shade, 0, 0, 9)) for shade in (0, 90, 180)]
    for form in ("GIF", "PNG", "WEBP"):
        content = encode_image(clear[0], form, save_all=True, append_images=clear[1:], disposal=2)
        yield f"moving-clear.{FILE_SUFFIXES[form]}", content
    # Color profiles, which are not applied.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {"srgb": srgb, "torn": srgb[:200], "nonsense": b"\xff" * 5000}
    for (name, profile), form in product(profiles.items(), ("JPEG", "PNG", "WEBP", "TIFF")):
        yield f"icc-{name}.{FILE_SUFFIXES[form]}", encode_noise(form, icc_profile=profile)
    # 16 bits per channel, and floats.
    wide = np.random.default_rng(0).integers(0, 65536, (24, 40), dtype=np.uint16)
    for form in ("PNG", "TIFF", "JPEG2000"):
        yield f"grey-16.{FILE_SUFFIXES[form]}", encode_image(Image.fromarray(wide), form)
    yield "grey-16.pgm", b"P5 40 24 65535\n" + wide.astype(">u2").tobytes()
    color = np.repeat(wide[:, :, None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in color)
    yield "colour-16.png", build_png(40, 24, zlib.compress(rows), bits=16)
    for name, values in (("nan", [np.nan] * 4), ("inf", [np.inf, -np.inf, np.nan, 0])):
        yield f"{name}.pfm", b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", *values)
    # Rare encodings.
    yield "progressive.jpg", encode_noise("JPEG", progressive=True)
    yield "restarts.jpg", encode_noise("JPEG", restart_marker_rows=1)
    yield "lossless.webp", encode_noise("WEBP", lossless=True)
    yield "interlaced.gif", encode_noise("GIF", interlace=True)
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        yield f"{packing}.tif", encode_noise("TIFF", compression=packing)
    for packing in ("group3", "group4", "tiff_ccitt"):
        bits = NOISE.convert("1")
        yield f"{packing}.tif", encode_image(bits, "TIFF", compression=packing)
    yield "plain.ppm", b"P3 2 1 255\n" + b"9 " * 6
    yield "more-than-its-pixels.png", encode_noise("PNG") + bytes(100_000)
    # Much data beside a small image.
    yield "one-tile.tif", build_tiled_tiff(10, 10, 16, zlib.compress(bytes(256)))
    yield "rows-that-unpack.png", build_png(8, 8, zlib.compress(bytes(100 << 20), 9))
    words = [build_png_chunk(b"tEXt", b"k%d\0" % number + b"x" * 10_000) for number in range(100)]
    yield "many-words.png", build_png(8, 8, zlib.compress(bytes(8 * 25)), *words)
    small = encode_image(Image.new("RGB", (8, 8)), "JPEG")
    for name, marker in (("comments", b"\xff\xfe"), ("applications", b"\xff\xed")):
        segment = marker + struct.pack(">H", 65_000) + b"x" * 64_998
        yield f"{name}.jpg", small[:2] + segment * 50 + small[2:]


def iter_invalid() -> NamedContents:
    """Yield files that are no images, and images that cannot be decoded with little memory."""
    yield "mode-YCbCr.tif", encode_image(convert_mode("YCbCr"), "TIFF")
    for form in ("PNG", "WEBP"):
        content = encode_noise(form, exif=b"Exif\0\0" + b"\xff" * 60)
        yield f"exif-of-nothing.{FILE_SUFFIXES[form]}", content
    for (form, suffix), tenth in product(FILE_SUFFIXES.items(), range(10)):
        content = encode_noise(form)
        yield f"cut-{tenth}.{suffix}", content[: len(content) * tenth // 10]
    no_images = {
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
    yield from ((f"no-image-{name}", content) for name, content in no_images.items())
    # Headers that name more pixels than there are bytes for, or none.
    zeros = zlib.compress(bytes(100 << 20), 9)
    for width, height in ((8001, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        yield f"pixels-{width}x{height}.png", build_png(width, height, zeros)
    small = encode_image(Image.new("RGB", (8, 8)), "JPEG")
    sides = struct.pack(">HH", 8, 8)
    assert small.count(sides) == 1
    for name, size in (("wide", (8, 65_000)), ("all", (65_000, 65_000)), ("none", (0, 8))):
        yield f"pixels-{name}.jpg", small.replace(sides, struct.pack(">HH", *size))
    one, many, none = (1, 1), (60_000, 60_000), (0, 0)
    screens = {"frame": (one, many), "screen": (many, one), "nothing": (none, none)}
    for name, (screen, frame) in (screens | {"no-frame": (one, none)}).items():
        head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        body = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\2\x44\1\0;"
        yield f"pixels-{name}.gif", head + body
    for name, width, height in (("many", 60_000, 60_000), ("upside", 1, -(2**31)), ("none", 0, 0)):
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        yield f"pixels-{name}.bmp", b"BM" + struct.pack("<IHHI", 200, 0, 0, 54) + info + bytes(100)
    for name, text in (("many", b"60000 60000"), ("none", b"0 5"), ("minus", b"-5 5")):
        yield f"pixels-{name}.ppm", b"P6 " + text + b" 255\n" + bytes(99)
    yield "digits.ppm", b"P6 " + b"9" * 5000 + b" 1 255\n"
    webp = encode_noise("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    webp_size = struct.pack("<I", 16_383)[:3] * 2
    yield "pixels.webp", _replace(webp, webp.index(b"VP8X") + 12, webp_size)
    jp2 = encode_noise("JPEG2000")
    start = jp2.index(b"\xff\x51") + 6
    jp2 = _replace(jp2, start, struct.pack(">II", 30_000, 30_000))
    yield "pixels.jp2", jp2
    yield "pixels.j2k", jp2[start - 8 :]
    avif = encode_noise("AVIF")
    yield "pixels.avif", _replace(avif, avif.index(b"ispe") + 8, struct.pack(">II", 2**31, 2**31))
    yield "wide-tile.tif", build_tiled_tiff(10, 10, 20_000, zeros)
    yield "wide-strip.tif", build_tiled_tiff(60_000, 60_000, 16, zeros)
    # Headers that are long, or unpack to 100 MB.
    row = zlib.compress(bytes(8 * 25))
    for kind, prefix in ((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
        chunk = build_png_chunk(kind, prefix + zeros)
        yield f"{kind.decode()}-that-unpacks.png", build_png(8, 8, row, chunk)
    yield "padded.jpg", b"\xff\xd8" + b"\xff" * 300_000


def _replace(content: bytes, start: int, new: bytes) -> bytes:
    return content[:start] + new + content[start + len(new) :]


def iter_lines() -> Iterator[EdgeCaseImage]:
    """Yield images from one pixel to lines of 20,000; aspect ratios over 200 are rejected."""
    sizes = ((1, 1), (1, 200), (200, 1), (1, 201), (1, 20_000), (20_000, 1))
    for (width, height), (form, suffix) in product(sizes, FILE_SUFFIXES.items()):
        if form in ("WEBP", "AVIF") and max(width, height) > 16_383:
            continue  # more than these formats can hold
        content = encode_image(Image.new("RGB", (width, height)), form)
        is_valid = max(width, height) <= 200 * min(width, height)
        yield EdgeCaseImage(f"line-{width}x{height}.{suffix}", content, is_valid)


def build_png(width: int, height: int, rows: bytes, *others: bytes, bits: int = 8) -> bytes:
    """Make an RGB PNG with these packed rows, and other chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    data, end = build_png_chunk(b"IDAT", rows), build_png_chunk(b"IEND", b"")
    chunks = (build_png_chunk(b"IHDR", header), *others, data, end)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def build_png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def build_tiled_tiff(width: int, height: int, side: int, tile: bytes) -> bytes:
    """Make a gray TIFF in one tile of `side` x `side`, deflated."""
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    entries |= {322: side, 323: side, 324: 8, 325: len(tile)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    offset = struct.pack("<I", 8 + len(tile))
    return b"II*\0" + offset + tile + struct.pack("<H", 10) + table + bytes(4)


def list_edge_case_images() -> list[EdgeCaseImage]:
    """List all images; names differ."""
    found = [EdgeCaseImage(*item) for item in iter_valid()]
    found += [*iter_lines(), *(EdgeCaseImage(*item, is_valid=False) for item in iter_invalid())]
    assert len({one.name for one in found}) == len(found), "two images of one name"
    return found


def write_samples(folder: Path, images: Iterable[EdgeCaseImage]) -> Path:
    """Write the images, and a data file with a sample of each, whose id is the image name."""
    lines = []
    for image in images:
        (folder / image.name).write_bytes(image.content)
        question = [{"type": "image", "image": image.name}, {"type": "text", "text": "Which?"}]
        answer = {"role": "assistant", "content": "red"}
        messages = [{"role": "user", "content": question}, answer]
        lines.append(json.dumps({"id": image.name, "messages": messages}) + "\n")
    (folder / "odd.jsonl").write_text("".join(lines))
    return folder / "odd.jsonl"


def main() -> None:
    from tiny_model import create_tiny_model

    from finesight.encode.renderer import NativeRenderer
    from finesight.ingest.check.image_catalog import inspect_images
    from finesight.model_folder import ModelFolder
    from finesight.samples.corpus import load_corpus
    from finesight.samples.image_file import CorruptImageError
    from finesight.settings.config import PixelRange, TrainFileSettings

    folder = Path(sys.argv[1])
    model = ModelFolder(create_tiny_model(folder / "tiny"))
    renderer = NativeRenderer(model, PixelRange(min_pixels=784, max_pixels=7056))
    images = list_edge_case_images()
    corpus = load_corpus((TrainFileSettings(path=write_samples(folder, images)),))
    for index, image in enumerate(images):
        before, reason = read_peak_memory(), ""
        try:
            assert len(renderer.encode(corpus.read_validated(index)).patches_ND), image.name
        except CorruptImageError as error:
            reason = str(error).splitlines()[0]
        (content,) = inspect_images([str(folder / image.name)])
        result = {"name": image.name, "reason": reason, "fault": content.issue_code}
        megabytes = (read_peak_memory() - before) / (1 << 20)
        print(json.dumps(result | {"megabytes": megabytes}), flush=True)


if __name__ == "__main__":
    main()
