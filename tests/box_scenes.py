"""Pictures with one white rectangle, and data sets taken there and back, for the box formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from finesight.data.exporting import Exported, export
from finesight.data.importing import Summary, import_file
from finesight.data.jsonl import Located, read_samples
from finesight.data.opening import Request
from finesight.data.sample import BoxPart, Sample, TextPart
from finesight.vision.picture import open_picture

Corners = tuple[int, int, int, int]


def white_at(path: Path, corners: Corners, size: tuple[int, int] = (40, 20)) -> Path:
    """A black picture of `size` (width, height), its pixels white from x1 up to x2, y1 up to y2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size)
    x1, y1, x2, y2 = corners
    ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    picture.save(path)
    return path


def white_in(path: Path) -> Corners:
    """The corners of the white pixels as a model sees the picture."""
    corners = open_picture(path).getbbox()
    assert corners is not None, f"{path} is black"
    return corners


def imported(source: Path, out: Path, **wishes: Any) -> tuple[list[Sample], Summary]:
    """The samples that an import of `source` writes, and its summary; `wishes` are a Request's."""
    summary = import_file(source, out, Request(**wishes))
    return read_samples(out / "data.jsonl"), summary


def there_and_back(source: Path, tmp_path: Path, **wishes: Any) -> Exported:
    """Import, export with the pictures copied, import again: the samples must be the same.

    Their pictures are compared by their content. Gives what the export says of itself.
    """
    first, summary = imported(source, tmp_path / "first", **wishes)
    located = [Located(sample, tmp_path / "first") for sample in first]
    exported = tmp_path / "exported"
    done = export(located, exported, summary.format, copy_pictures=True)
    again = exported / "annotations.json" if summary.format == "coco" else exported
    second, seen = imported(again, tmp_path / "second", **wishes)
    assert seen.format == summary.format
    assert _by_content(second, tmp_path / "second") == _by_content(first, tmp_path / "first")
    return done


def answers(samples: list[Sample]) -> list[list[object]]:
    """Of each sample's last turn: texts, and boxes as (label, corners)."""
    return [[_brief(part) for part in sample.messages[-1].content] for sample in samples]


def questions(samples: list[Sample]) -> list[str]:
    """The text of each sample's first turn."""
    return [
        "".join(part.text for part in sample.messages[0].content if isinstance(part, TextPart))
        for sample in samples
    ]


def _brief(part: object) -> object:
    if isinstance(part, BoxPart):
        return part.label, part.xyxy
    assert isinstance(part, TextPart), f"{part} in an answer"
    return part.text


def _by_content(samples: list[Sample], folder: Path) -> list[Sample]:
    def content(name: str) -> str:
        return (folder / name).read_bytes().hex()

    return [sample.with_files(content) for sample in samples]
