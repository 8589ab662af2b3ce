"""Images with one white rectangle, and round trips of datasets through the box formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image, ImageDraw

from finesight.data.exporter import ExportSummary, export_dataset
from finesight.data.import_source import ImportOptions
from finesight.data.importer import ImportSummary, import_dataset
from finesight.data.sample import BoxPart, LocatedSample, Sample, TextPart, read_samples
from finesight.encode.family import ImageBox
from finesight.vision.image_processing import load_image

PixelBox = tuple[int, int, int, int]

LABEL_FILES = {
    "coco": "annotations.json",
    "label-studio": "tasks.json",
    "label-studio-predictions": "tasks.json",
}
"""Names of the exported files that an import needs, for formats without a folder."""


@st.composite
def image_boxes(
    draw: st.DrawFn, factor: int, labels: tuple[str | None, ...], max_multiple: int = 40
) -> ImageBox:
    """Draw boxes in images whose resized sides are multiples of a factor."""
    original_size = draw(st.tuples(*[st.integers(1, 3000)] * 2))
    multiples = draw(st.tuples(*[st.integers(1, max_multiple)] * 2))
    xs, ys = (
        sorted(draw(st.tuples(*[st.floats(0, side)] * 2))) for side in reversed(original_size)
    )
    resized_size = multiples[0] * factor, multiples[1] * factor
    label = draw(st.sampled_from(labels))
    return ImageBox(label, (xs[0], ys[0], xs[1], ys[1]), original_size, resized_size)


def write_box_image(path: Path, corners: PixelBox, size: tuple[int, int] = (40, 20)) -> Path:
    """Draw a black image of `size` (width, height), white from x1 up to x2 and y1 up to y2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    x1, y1, x2, y2 = corners
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    image.save(path)
    return path


def find_box(path: Path) -> PixelBox:
    """Return the corners of the white pixels in the decoded image."""
    corners = load_image(path).getbbox()
    assert corners is not None, f"{path} is black"
    return corners


def import_samples(source: Path, out: Path, **options: Any) -> tuple[list[Sample], ImportSummary]:
    """The samples that an import of `source` writes, and its summary; `wishes` are a Request's."""
    summary = import_dataset(source, out, ImportOptions(**options))
    return read_samples(out / "data.jsonl"), summary


def check_export_roundtrip(source: Path, tmp_path: Path, **options: Any) -> ExportSummary:
    """Import, export with copied images, import again, and compare the samples.

    Images are compared by content. Returns the summary of the export.
    """
    first, summary = import_samples(source, tmp_path / "first", **options)
    located_sample = [LocatedSample(sample, tmp_path / "first") for sample in first]
    exported = tmp_path / "exported"
    done = export_dataset(located_sample, exported, summary.format, copy_images=True)
    again = exported / LABEL_FILES.get(summary.format, "")
    second, seen = import_samples(again, tmp_path / "second", **options)
    assert seen.format == summary.format
    assert _with_image_contents(second, tmp_path / "second") == _with_image_contents(
        first, tmp_path / "first"
    )
    return done


def list_answers(samples: list[Sample]) -> list[list[object]]:
    """Of each sample's last turn: texts, and boxes as (label, corners)."""
    return [[_summarize_part(part) for part in sample.messages[-1].content] for sample in samples]


def list_questions(samples: list[Sample]) -> list[str]:
    """The text of each sample's first turn."""
    return [
        "".join(part.text for part in sample.messages[0].content if isinstance(part, TextPart))
        for sample in samples
    ]


def _summarize_part(part: object) -> object:
    if isinstance(part, BoxPart):
        return part.label, part.xyxy
    assert isinstance(part, TextPart), f"{part} in an answer"
    return part.text


def _with_image_contents(samples: list[Sample], folder: Path) -> list[Sample]:
    def content(name: str) -> str:
        return (folder / name).read_bytes().hex()

    return [sample.map_paths(content) for sample in samples]
