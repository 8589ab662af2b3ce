"""A folder of images and texts: a.jpg and a.txt with the answer.

Trailing line breaks of a text are removed. Images without a text file are skipped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from finesight.errors import UserError
from finesight.ingest.folder_listing import FolderListing, list_folder
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    RowImages,
    make_text_part,
)
from finesight.ingest.formats.image_annotations import (
    LOST_WHITESPACE,
    assign_text_file,
    group_by_image,
    require_inside_output,
)
from finesight.ingest.row_reader import RowReader, SourceRow, rows_from_items
from finesight.samples.sample import (
    MAX_LABEL_FILE_BYTES,
    EmptyAnswerError,
    InvalidRowError,
    LocatedSample,
    Message,
    read_text_file,
)

_COORDINATES = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:(?:, ?|;| )-?\d+(?:\.\d+)?){3}(?![\w.])")
"""Pattern of four numbers in a row, as in annotations of boxes and polygons."""

REASON_NO_TEXT_FILE = "images without a text file of the same name"


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open a folder of images and text files as rows, one per image."""
    listing = list_folder(source)
    images = listing.image_files()
    texts = {_get_pair_key(text): text for text in listing.files_with_suffix(".txt")}
    num_with_text = sum(_get_pair_key(image) in texts for image in images)
    if not num_with_text:
        return None

    def make_row(row_number: int, image: Path) -> SourceRow:
        text = texts.get(_get_pair_key(image))
        record = {"id": image.stem, "image": str(image), "text": str(text) if text else None}
        return SourceRow(row_number, str(image), record, source.stem)

    reason = f"{num_with_text} images with a text file of the same name"
    stems, used = set(map(_get_pair_key, images)), {*images, *texts.values()}
    others = [one for one in listing.files if one not in used or _get_pair_key(one) not in stems]
    if others:
        reason += f"; other files, not read: {FolderListing(source, tuple(others))}"
    return rows_from_items(images, make_row), reason


def _get_pair_key(path: Path) -> str:
    """Return the path that an image and its text share, with composed characters (NFC)."""
    return normalize("NFC", str(path.with_suffix("")))


def _has_coordinate_lines(text: str) -> bool:
    """Return whether half of the lines contain four numbers in a row."""
    num_lines = 0
    num_coordinate_lines = 0
    for line in text.splitlines():
        if line.strip():
            num_lines += 1
            num_coordinate_lines += _COORDINATES.search(line) is not None
    return 0 < num_lines <= 2 * num_coordinate_lines


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build a training example from an image and its text file."""
    if row.record["text"] is None:
        context.skipped_rows[REASON_NO_TEXT_FILE] += 1
        return []
    file = Path(row.record["text"])
    text = read_text_file(file, MAX_LABEL_FILE_BYTES).replace("\r\n", "\n").rstrip("\n")
    if not text.strip():
        what, remedy = "an empty text file", "write the answer into it, or remove the file"
        raise EmptyAnswerError(what, where=str(file), expected="the answer", remedy=remedy)
    if _has_coordinate_lines(text):
        raise InvalidRowError(
            f"lines of {file.name} have four or more numbers, as annotations with coordinates:"
            f" {text[:60]!r}",
            "a text file with the answer",
            "convert annotations to COCO, or to a table with a row per box (--map"
            " box=x1,y1,x2,y2); if the lines are the answer, import a table of image and text",
        )
    image = RowImages(context).add_image(row.record["image"])
    user = Message(role="user", content=context.add_prompt([image]))
    return [ImportExample(row.id, (user,), ((make_text_part(text),),))]


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write a text file with the answer next to each image."""
    used_names: set[str] = set()
    records, _ = group_by_image(samples, context, set(), is_detection=False)
    for record in records:
        name = require_inside_output(record.image_path, context, "a folder of texts")
        text = assign_text_file(name, used_names)
        if len(record.answers) != 1:
            raise UserError(
                f"{len(record.answers)} texts for {text}",
                where=str(record.image_path),
                expected="one answer per image",
                remedy="export as coco, which supports several captions per image",
            )
        context.lost_counts[LOST_WHITESPACE] += record.answers[0] != record.answers[0].rstrip("\n")
        yield text, f"{record.answers[0]}\n".encode()


COMPONENT = DatasetFormat(
    name="folder",
    description="a folder of images, each with a .txt file of the same name",
    parse_row=parse_row,
    supported_options=frozenset({"prompt"}),
    open_dataset=open_folder,
    write_files=write_files,
    position=100,
)
