"""Import of HEIC and AVIF photos, animated images, and truncated or corrupt images."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from image_fixtures import write_jsonl
from PIL import Image

from finesight.errors import UserError
from finesight.ingest import importer
from finesight.ingest.exporter import export_dataset
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import ImportSummary, import_dataset
from finesight.samples.image_file import (
    CorruptImageError,
    list_pages,
    read_image_size,
    sha256_content,
)
from finesight.samples.sample import LocatedSample, read_samples
from finesight.vision.image_processing import load_image

pillow_heif = pytest.importorskip("pillow_heif", reason="the package pillow-heif is not installed")
pypdfium2 = pytest.importorskip("pypdfium2", reason="the package pypdfium2 is not installed")

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
    assert summary.num_images == 5, "the pages of a TIFF are images"
    assert list(summary.source_notes.values()) == [2]
    assert "only the first frame" in next(iter(summary.source_notes))


def write_pages(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write a document with pages of a size, in points or pixels, each with its own gray level."""
    pages = [Image.new("RGB", size, (50 * n, 0, 0)) for n, size in enumerate(sizes, 1)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def test_pages_of_documents_are_images(tmp_path: Path) -> None:
    pdf = write_pages(tmp_path / "a.pdf", [(40, 30), (40, 30), (31, 50)])
    write_pages(tmp_path / "b.tif", [(20, 10), (30, 10)])
    write_pages(tmp_path / "c.pdf", [(40, 30)])
    rows = [{"image": "a.pdf", "text": "x"}, {"image": "a.pdf#page=3", "box": [1, 2, 30, 40]}]
    rows += [{"image": "b.tif", "text": "y"}, {"image": "c.pdf", "box": [1, 2, 30, 40]}]
    write_jsonl(tmp_path / "rows.jsonl", [{"label": "cat", **row} for row in rows])
    columns = {"image": "image", "answer": "text"}
    options = replace(OPTIONS, columns=columns, pages=[(1, 1), (3, None)], copy_images=True)
    one = replace(options, limit=1)
    assert not import_dataset(tmp_path / "rows.jsonl", tmp_path / "texts", one).source_notes
    options = replace(options, columns={"image": "image", "box": "box", "label": "label"})
    import_dataset(tmp_path / "rows.jsonl", tmp_path / "boxes", replace(options, row_range=(1, 2)))
    (texts,), (boxes,) = (read_samples(tmp_path / f"{n}/data.jsonl") for n in ("texts", "boxes"))
    paths = [part.image for part in texts.iter_parts() if part.type == "image"]
    assert paths == ["images/a.pdf#page=1", "images/a.pdf#page=3"]
    assert (tmp_path / "texts/images/a.pdf").read_bytes() == pdf.read_bytes()
    assert [part.xyxy for part in boxes.iter_parts() if part.type == "box"] == [(1, 2, 30, 40)]
    first, second, third = (Path(f"{pdf}#page={number}") for number in (1, 2, 3))
    assert read_image_size(third) == (100, 62)
    assert len({sha256_content(page) for page in (pdf, first, second, third)}) == 4
    with ThreadPoolExecutor(4) as pool:  # PDFium is not thread-safe
        pixels = list(pool.map(lambda page: load_image(page).tobytes(), [first, second] * 20))
    assert len(set(pixels)) == 2
    assert list_pages(tmp_path / "c.pdf") == [tmp_path / "c.pdf"]
    assert load_image(tmp_path / "b.tif#page=2").size == (30, 10)
    source = [LocatedSample(texts, tmp_path / "texts")]
    export_dataset(source, tmp_path / "swift", "ms-swift", copy_images=False)
    exported = load_image(tmp_path / "swift/images/a-2.png")
    assert exported.tobytes() == load_image(third).tobytes()
    export_dataset(source, tmp_path / "openai", "openai", copy_images=False)
    (row,) = (tmp_path / "openai/data.jsonl").read_text().splitlines()
    assert row.count("data:image/png;base64,") == 2
    assert not (tmp_path / "openai/images").exists()


def test_reduced_copies_in_a_tiff_are_not_pages(tmp_path: Path) -> None:
    images = [Image.new("L", (size, size)) for size in (40, 20, 40)]
    images[1].encoderinfo = {"tiffinfo": {254: 1}}
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    names = [page.name for page in list_pages(tmp_path / "a.tif")]
    assert names == ["a.tif#page=1", "a.tif#page=3"]


def test_page_size_is_limited(tmp_path: Path) -> None:
    with closing(pypdfium2.PdfDocument.new()) as document:
        for size, rotation in (((100, 50), 90), ((14_400, 14_400), 0), ((0.1, 0.1), 0)):
            document.new_page(*size).set_rotation(rotation)
        document.save(tmp_path / "a.pdf")
    pages = list_pages(tmp_path / "a.pdf")
    assert [read_image_size(page) for page in pages] == [(200, 100), (4096, 4096), (1, 1)]
    assert load_image(pages[0]).size == (100, 200)
    assert load_image(pages[2]).size == (1, 1)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.pdf#page=4", "3 pages"),
        ("a.pdf", "101 of its 101 pages"),
        ("damaged.pdf", "a damaged PDF"),
        ("empty.pdf", "without pages"),
        ("encrypted.pdf", "encrypted"),
        ("a.png#page=2", "1 page"),
        ("missing.pdf#page=2", "no such image"),
    ],
)
def test_invalid_documents_are_refused(tmp_path: Path, name: str, what: str) -> None:
    num_pages = 101 if "101" in what else 3
    content = write_pages(tmp_path / "a.pdf", [(2, 2)] * num_pages).read_bytes()
    write_noise(tmp_path / "a.png")
    (tmp_path / "damaged.pdf").write_bytes(content[:200])
    with closing(pypdfium2.PdfDocument.new()) as document:
        document.save(tmp_path / "empty.pdf")
    key = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"00" * 32, b"11" * 32)
    content = content.replace(b"/Root", b"/ID [<00> <00>] /Encrypt %s /Root" % key)
    (tmp_path / "encrypted.pdf").write_bytes(content)
    with pytest.raises(CorruptImageError):  # its error code does not reach the next document
        read_image_size(tmp_path / "encrypted.pdf")
    with pytest.raises(UserError, match=what) as caught:
        import_images(tmp_path, name)
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_box_in_a_document_of_several_pages_is_refused(tmp_path: Path) -> None:
    write_pages(tmp_path / "a.tif", [(20, 10), (30, 10)])
    row = {"image": "a.tif", "box": [1, 2, 3, 4], "label": "cat"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    options = replace(OPTIONS, columns={"image": "image", "box": "box", "label": "label"})
    with pytest.raises(UserError, match=r"a box in a document .* 2 pages"):
        import_dataset(rows, tmp_path / "out", options)


def test_pdf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pages(tmp_path / "a.pdf", [(2, 2)])
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(UserError, match="a PDF file, but") as caught:
        import_images(tmp_path, "a.pdf")
    assert "pip install 'finesight[pdf]'" in caught.value.remedy


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
