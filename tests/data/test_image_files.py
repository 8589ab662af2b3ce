"""Import of HEIC and AVIF photos, animated images, and truncated or corrupt images."""

import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pillow_heif
import pytest
from image_fixtures import write_jsonl
from PIL import Image

from finesight.data import importer
from finesight.data.image_header import read_image_size
from finesight.data.import_source import ImportOptions
from finesight.data.importer import ImportSummary, import_dataset
from finesight.errors import UserError
from finesight.vision.image_processing import load_image

OPTIONS = ImportOptions(columns={"image": "image", "answer": "text"}, prompt="What?")


def import_images(folder: Path, *names: str, options: ImportOptions = OPTIONS) -> ImportSummary:
    rows = write_jsonl(folder / "rows.jsonl", [{"image": name, "text": "x"} for name in names])
    return import_dataset(rows, folder / "out", options)


def write_noise(path: Path) -> Path:
    Image.effect_noise((160, 120), 90).convert("RGB").save(path)
    return path


@pytest.fixture
def heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HEIC file of 64 x 48 pixels, in a process that has not decoded one yet."""
    for table in (Image.OPEN, Image.SAVE):
        monkeypatch.delitem(table, "HEIF", raising=False)
    content = io.BytesIO()
    image = Image.new("RGB", (64, 48), "red")
    pillow_heif.from_pillow(image).save(content, quality=90)
    (tmp_path / "a.HEIC").write_bytes(content.getvalue())
    return tmp_path / "a.HEIC"


def test_heic_and_avif_photos(heic: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(heic.parent / "b.avif")
    (heic.parent / "a.jpg").write_bytes(heic.read_bytes())  # the suffix does not matter
    assert import_images(heic.parent, heic.name, "b.avif", "a.jpg").num_images == 3
    assert read_image_size(heic) == (48, 64)
    red, green, blue = load_image(heic).getpixel((30, 20))
    assert red > 240
    assert max(green, blue) < 15


def test_heic_without_its_package(heic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match="a HEIC image, but") as caught:
        import_images(heic.parent, heic.name, heic.name)
    assert "pip install 'finesight[heif]'" in caught.value.remedy
    assert "and 1 more such rows" in caught.value.what


def test_animated_images_are_reported(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a.gif", "b.webp", "c.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "d.jpg")
    summary = import_images(tmp_path, "a.gif", "b.webp", "c.tif", "d.jpg", "a.gif")
    assert list(summary.source_notes.values()) == [3]
    assert "only the first frame" in next(iter(summary.source_notes))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp", "a.avif"])
def test_truncated_images_are_refused(tmp_path: Path, name: str) -> None:
    content = write_noise(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
    write_noise(tmp_path / "good.png")
    with pytest.raises(UserError, match="1 of 2 rows are invalid") as caught:
        import_images(tmp_path, "good.png", name)
    assert f"line 2: {tmp_path / name}: " in caught.value.what
    assert "the image again" in caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("memory", "threads"), [(0, 1), (2**31, 4), (2**50, 16)])
def test_decoding_threads_and_progress(tmp_path, monkeypatch, memory, threads):
    counts: list[object] = []

    def start_pool(num_threads: int) -> ThreadPoolExecutor:
        counts.append(num_threads)
        return ThreadPoolExecutor(num_threads)

    @contextmanager
    def progress_stage(title: str, total: int) -> Iterator[Callable[[int], None]]:
        counts.extend((title, total))
        yield counts.append

    monkeypatch.setattr(importer, "ThreadPoolExecutor", start_pool)
    monkeypatch.setattr(importer, "num_allowed_cpus", lambda: 64)
    monkeypatch.setattr(importer, "available_memory", lambda: memory)
    source = write_jsonl(tmp_path / "a.jsonl", [{"image": write_noise(tmp_path / "a.png").name}])
    options = ImportOptions(columns={"image": "image", "answer": "image"}, prompt="?")
    import_dataset(source, tmp_path / "out", options, progress_stage)
    assert counts == ["images", 1, threads, 1]


def test_errors_are_grouped_by_kind(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(20)]
    for n, name in enumerate(names):
        content = write_noise(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: None if n == 0 else 900])
    with pytest.raises(UserError, match="26 of 27 rows are invalid") as caught:
        import_images(tmp_path, *names, *(f"gone-{n}.png" for n in range(7)))
    text = caught.value.what
    assert text.count("truncated") == 5
    assert text.count("no such image") == 5
    assert "and 14 more such rows" in text
    assert "and 2 more such rows" in text
    skip = ImportOptions(columns=OPTIONS.columns, prompt="?", on_invalid_row="skip")
    summary = import_images(tmp_path, *names, options=skip)
    assert summary.skipped_rows == {"an image is missing or corrupt": 19}
    lines = (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()
    assert len(lines) == 19
    assert '"line 2"' in lines[0]
