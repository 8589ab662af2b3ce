"""A folder of images with one answer per image in a text file.

The files have the same name, such as folder/a.jpg and folder/a.txt. The option --prompt sets the
question. Trailing line breaks of a text are removed. Images without a text file are skipped and
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    make_text_part,
)
from finesight.data.formats.image_annotations import (
    LOST_WHITESPACE,
    assign_text_file,
    group_texts_by_image,
    require_inside_output,
)
from finesight.data.row_reader import RowReader, SourceRow, list_folder, rows_from_items
from finesight.data.sample import MAX_LABEL_FILE_BYTES, LocatedSample, Message, read_text_file
from finesight.errors import UserError

REASON_NO_TEXT_FILE = "images without a text file of the same name"


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open a folder of images and text files as rows, one per image.

    Returns:
        The rows and the reason for the match, or None if no image has a text file.
    """
    if not source.is_dir():
        return None
    listing = list_folder(source)
    images = listing.image_files()
    texts = {text.with_suffix(""): text for text in listing.files_with_suffix(".txt")}
    num_with_text = sum(image.with_suffix("") in texts for image in images)
    if not num_with_text:
        return None

    def make_row(row_number: int, image: Path) -> SourceRow:
        text = texts.get(image.with_suffix(""))
        record = {"id": image.stem, "image": str(image), "text": str(text) if text else None}
        return SourceRow(row_number, str(image), record, source.stem)

    return rows_from_items(
        images, make_row
    ), f"{num_with_text} images with a text file of the same name"


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build a training example from an image and its text file."""
    if row.record["text"] is None:
        context.skipped_rows[REASON_NO_TEXT_FILE] += 1
        return []
    file = Path(row.record["text"])
    text = read_text_file(file, MAX_LABEL_FILE_BYTES).replace("\r\n", "\n").rstrip("\n")
    image = RowImages(context).add_image(row.record["image"])
    user = Message(role="user", content=context.add_prompt([image]))
    return [ImportExample(row.id, (user,), ((make_text_part(text),),))]


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write a text file with the answer next to each image."""
    used_names: set[str] = set()
    for record in group_texts_by_image(samples, context, set()):
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


FORMAT = DatasetFormat(
    name="folder",
    description="a folder of images, each with a .txt file of the same name",
    parse_row=parse_row,
    supported_options=frozenset({"prompt"}),
    open_dataset=open_folder,
    write_files=write_files,
)
