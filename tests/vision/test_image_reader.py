"""Reading untrusted images in worker processes."""

import ast
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_requests import make_jpeg2000, make_progressive_jpeg, make_small_image
from PIL import Image

import finesight
from finesight.files.worker_pool import JobOutput, Worker
from finesight.samples.image_file import CorruptImageError
from finesight.vision import image_reader
from finesight.vision.image_processing import load_image
from finesight.vision.image_reader import ImageReader, create_image_pool

SERVER_PACKAGES = ("app", "label", "serve")
WORKER_MODULES = {
    "serve/preprocessing_jobs.py",
    "app/program_question.py",
    "app/import_preview.py",
}
"""Modules whose functions run in worker processes."""

IMAGE_FUNCTIONS = {"PIL", "load_image", "read_image_size", "open_image_header", "check_pixels"}
IMAGE_FUNCTIONS |= {"read_visual_size", "read_video_header", "iter_video_frames"}


@pytest.fixture(scope="module")
def reader() -> Iterator[ImageReader]:
    pool = create_image_pool()
    yield ImageReader(pool)
    pool.close()


def test_worker_returns_size_pixels_and_copy(reader: ImageReader, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, exif=exif)

    size, copy, copy_size = reader.encode(path, 20)
    shown = Image.open(io.BytesIO(copy))
    assert (size, shown.format, max(shown.size)) == ((40, 30), "WEBP", 20)
    assert copy_size == shown.size[::-1]
    assert not shown.getexif()
    assert reader.read_size(path) == (40, 30)
    assert np.array_equal(reader.load(path), load_image(path))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (make_jpeg2000, "CPU time"),
        (make_progressive_jpeg, "scans"),
        (lambda: make_small_image("PNG")[:60], "truncated|corrupt"),
        (lambda: b"text", "not an image"),
    ],
)
def test_image_beyond_a_limit_is_an_error_about_its_file(
    reader: ImageReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: Callable[[], bytes],
    reason: str,
) -> None:
    monkeypatch.setattr(image_reader, "MAX_IMAGE_CPU_S", 0.1)
    path = tmp_path / "a.png"
    path.write_bytes(data())
    with pytest.raises(CorruptImageError, match=rf"a\.png: .*(?:{reason})"):
        reader.encode(path, 100)


@pytest.mark.parametrize(("pixels", "limit"), [(30, 4.0), (600, 12.0), (6000, 20.0)])
def test_limit_of_time_grows_with_the_pixels(reader, tmp_path, monkeypatch, pixels, limit):
    limits, call = list[float](), Worker.call

    def spy(worker: Worker, *args: Any, max_cpu_s: float) -> JobOutput:
        limits.append(max_cpu_s)
        return call(worker, *args, max_cpu_s=max_cpu_s)

    monkeypatch.setattr(Worker, "call", spy)
    monkeypatch.setattr(image_reader, "LIMITED_PIXELS", 200)
    Image.new("L", (pixels // 10, 10)).save(tmp_path / "a.png")
    reader.check(tmp_path / "a.png")
    # The first frame of a video needs less time than all of them.
    (tmp_path / "a.mp4").touch()
    for read in (reader.check, partial(reader.encode, max_side=9), reader.read_size):
        with pytest.raises(CorruptImageError):
            read(tmp_path / "a.mp4")
    assert limits == [4.0, limit, 120.0, 20.0, 20.0]


def test_servers_read_images_in_worker_processes_only() -> None:
    root, found = Path(finesight.__file__).parent, list[str]()
    for path in (path for name in SERVER_PACKAGES for path in (root / name).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = [one for alias in node.names for one in alias.name.split(".")]
                words += (getattr(node, "module", "") or "").split(".")
            elif isinstance(node, ast.Attribute):
                words = [node.attr]
            else:
                continue
            found += [f"{name}: {word}" for word in IMAGE_FUNCTIONS.intersection(words)]
    assert [one for one in found if one.split(":")[0] not in WORKER_MODULES] == []
