"""Images with one white rectangle, and round trips of datasets through the box formats."""

from pathlib import Path
from typing import Any

from case_files import load_cases
from PIL import Image, ImageDraw

from finesight.ingest.exporter import ExportSummary, export_dataset
from finesight.ingest.formats.dataset_format import DatasetFormat, ImportContext, ImportExample
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import ImportSummary, import_dataset
from finesight.ingest.row_reader import SourceRow
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    read_samples,
)
from finesight.vision.image_processing import load_image

PixelBox = tuple[int, int, int, int]

LABEL_FILES = {"coco": "annotations.json"}
LABEL_FILES |= dict.fromkeys(("label-studio", "label-studio-predictions"), "tasks.json")
"""Names of the exported files that an import needs, for formats without a folder."""

SCENES: dict[str, dict[str, Any]] = load_cases("box_scenes")
"""One scene in every format of files: a dog on the white pixels, a small dog and a lawn in an image
of 40 x 20 pixels. `lawn`, `dog`: the part of the first file that is replaced."""
SCENE = (12, 3, 32, 17)
"""White pixels of the scene."""


def write_box_image(path: Path, corners: PixelBox, size: tuple[int, int] = (40, 20)) -> Path:
    """Draw a black image of `size` (width, height), white from x1 up to x2 and y1 up to y2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    x1, y1, x2, y2 = corners
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    image.save(path)
    return path


def write_scene(name: str, root: Path, old: str = "", new: str = "") -> Path:
    """Write the scene in a format, with a text of its first file replaced."""
    scene = SCENES[name]
    write_box_image(root / ("data/a.png" if name == "fiftyone" else "a.png"), SCENE)
    assert old in next(iter(scene["files"].values()))
    for file, text in scene["files"].items():
        (root / file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return root / scene.get("source", ".")


def find_box(path: Path) -> PixelBox:
    """Return the corners of the white pixels in the decoded image."""
    corners = load_image(path).getbbox()
    assert corners is not None, f"{path} is black"
    return corners


def import_samples(source: Path, out: Path, **options: Any) -> tuple[list[Sample], ImportSummary]:
    summary = import_dataset(source, out, ImportOptions(**options))
    return read_samples(out / "data.jsonl"), summary


def check_export_roundtrip(source: Path, tmp_path: Path, **options: Any) -> ExportSummary:
    """Import, export, import again, and compare samples and image contents."""
    first, summary = import_samples(source, tmp_path / "first", **options)
    located_samples = [LocatedSample(sample, tmp_path / "first") for sample in first]
    exported = tmp_path / "exported"
    done = export_dataset(located_samples, exported, summary.format, copy_images=True)
    again = exported / LABEL_FILES.get(summary.format, "")
    second, seen = import_samples(again, tmp_path / "second", **options)
    assert seen.format == summary.format
    assert read_contents(second, tmp_path / "second") == read_contents(first, tmp_path / "first")
    return done


def read_contents(samples: list[Sample], folder: Path) -> list[Sample]:
    return [one.map_paths(lambda name: (folder / name).read_bytes().hex()) for one in samples]


def list_answers(samples: list[Sample]) -> list[list[object]]:
    """Of each sample's last turn: texts, and boxes as (label, corners)."""
    return [
        [
            (part.label, part.xyxy) if isinstance(part, BoxPart) else getattr(part, "text", part)
            for part in sample.messages[-1].content
        ]
        for sample in samples
    ]


def list_questions(samples: list[Sample]) -> list[str]:
    """The text of each sample's first turn."""
    questions = [sample.messages[0].content for sample in samples]
    return ["".join(getattr(part, "text", "") for part in parts) for parts in questions]


def parse_record(
    data_format: DatasetFormat, record: dict[str, Any], folder: Path, **context_fields: Any
) -> ImportExample:
    """Make the case of a record whose images are in `folder`; `said` are fields of Reading."""
    row = SourceRow(number=3, location="line 3", record=record, stem="rows")
    (case,) = data_format.parse_examples(
        row, ImportContext(ImageResolver(folder, folder / "out"), **context_fields)
    )
    return case


def summarize_content(content: tuple[ContentPart, ...]) -> list[object]:
    """Return text unchanged, an image as its file name, a box as (image, label, corners).

    Tool calls and videos stay as they are.
    """
    summary: list[object] = []
    for part in content:
        if isinstance(part, TextPart):
            summary.append(part.text)
        elif isinstance(part, ImagePart):
            summary.append(Path(part.image))
        elif isinstance(part, BoxPart):
            summary.append((part.image, part.label, part.xyxy[: 2 if part.is_point else 4]))
        else:
            summary.append(part)
    return summary


def list_turns(case: ImportExample) -> list[tuple[str, list[object]]]:
    """Role and content of every turn, the first answer last."""
    last = Message(role="assistant", content=case.answers[0])
    return [
        (message.role, summarize_content(message.content))
        for message in (*case.prompt_messages, last)
    ]
