"""A folder of images for each class: LABEL/a.jpg, where the name of the folder is the answer.

The folders may be in split folders such as train and validation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

from finesight.errors import UserError, format_count
from finesight.ingest.folder_listing import ROW_SUFFIXES, list_folder
from finesight.ingest.formats.dataset_format import DatasetFormat, ImportContext, ImportExample
from finesight.ingest.formats.image_annotations import build_text_example
from finesight.ingest.formats.split_folders import SPLIT_ALIASES, order_by_split
from finesight.ingest.row_reader import RowReader, SourceRow, rows_from_items

MAX_SHOWN_CLASSES = 20
"""Maximum number of class names in the summary of an import."""

_NO_CLASS_NAMES = frozenset({"images", "img", "masks", "labels", "annotations"})
"""Names of folders, in lower case, that are classes only with `--format classes`."""


def open_class_folders(source: Path, *, is_requested: bool = False) -> tuple[RowReader, str] | None:
    """Open class folders of images as rows, with the folder name as label.

    Args:
        is_requested: Ignore other files, accept class names such as `images`, and raise UserError
            if the folders are not classes.
    """
    listing = list_folder(source)
    images, num_train, note = order_by_split(source, listing.image_files())
    depth = 1 if note else 0
    # macOS decomposes the characters of names, in contrast to texts.
    paths = [Path(normalize("NFC", str(image.relative_to(source)))).parts for image in images]
    labels = [parts[depth:-1] for parts in paths]
    classes = Counter(label[0] for label in sorted(labels) if label)
    names = {name.lower() for name in classes}
    problem = ""
    if not all(labels):
        problem = f"the image {images[labels.index(())].name} is outside the class folders"
    elif len(classes) < 2:
        problem = f"{len(classes)} class folders with images{note}: {', '.join(classes)}"
        problem = problem.removesuffix(": ")
    elif names <= SPLIT_ALIASES.keys():
        problem = f"split folders without train: {', '.join(classes)}"
    if problem and is_requested:
        raise UserError(
            problem,
            where=str(source),
            expected="at least two folders, named after their classes, with all images",
            remedy="move the images to folders CLASS/, or train/CLASS/ and validation/CLASS/",
        )
    if problem:
        return None
    is_other = any(map(listing.files_with_suffix, (*ROW_SUFFIXES, ".xml", ".txt")))
    if not is_requested and (is_other or names & (_NO_CLASS_NAMES | SPLIT_ALIASES.keys())):
        return None

    def make_row(row_number: int, image: Path) -> SourceRow:
        parts = paths[row_number - 1]
        record = {
            "id": "-".join((*parts[:-1], image.stem)),
            "image": str(image),
            "label": parts[depth],
            "classes": list(classes),
        }
        return SourceRow(row_number, str(image), record, source.stem)

    counts = [f"{name} ({count})" for name, count in classes.items()]
    shown = f"classes: {', '.join(counts[:MAX_SHOWN_CLASSES])}"
    if len(counts) > MAX_SHOWN_CLASSES:
        shown += f" and {len(counts) - MAX_SHOWN_CLASSES} more"
    reader = rows_from_items(images, make_row)
    rows = replace(reader, eval_start=num_train, text_format=shown)
    return rows, f"one folder per class, {format_count(len(classes), 'class')}{note}"


def parse_class_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from an image and the name of its class folder."""
    label, classes = row.record["label"], row.record["classes"]
    return build_text_example(row.id, row.record["image"], [label], classes, context)


COMPONENT = DatasetFormat(
    name="classes",
    description="a folder of images for each class",
    parse_row=parse_class_row,
    supported_options=frozenset({"prompt"}),
    open_dataset=open_class_folders,
    open_requested=partial(open_class_folders, is_requested=True),
    # After the other folders: any folders of images match.
    position=110,
)
