"""Folders of images: with a text file per image, with a metadata table, or one folder per class.

- folder: a.jpg and a.txt with the answer. Trailing line breaks of a text are removed. Images
  without a text file are skipped and counted.
- imagefolder (Hugging Face): metadata.csv, .jsonl or .parquet with a column `file_name`. Its rows
  are parsed as a table.
- classes: LABEL/a.jpg, where the name of the folder is the answer.

The last two may be in split folders such as train and validation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

from finesight.data.formats import table
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    RowImages,
    make_text_part,
)
from finesight.data.formats.image_annotations import (
    LOST_WHITESPACE,
    assign_text_file,
    build_text_example,
    group_by_image,
    require_inside_output,
)
from finesight.data.row_reader import (
    ROW_SUFFIXES,
    Record,
    RowReader,
    SourceRow,
    concat_rows,
    list_folder,
    open_row_file,
    rows_from_items,
)
from finesight.data.sample import (
    MAX_LABEL_FILE_BYTES,
    EmptyAnswerError,
    LocatedSample,
    Message,
    read_text_file,
)
from finesight.errors import UserError, format_count

REASON_NO_TEXT_FILE = "images without a text file of the same name"


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open a folder of images and text files as rows, one per image."""
    if not source.is_dir():
        return None
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
    return rows_from_items(images, make_row), reason


def _get_pair_key(path: Path) -> str:
    """Return the path that an image and its text share, with composed characters (NFC)."""
    return normalize("NFC", str(path.with_suffix("")))


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


FORMAT = DatasetFormat(
    name="folder",
    description="a folder of images, each with a .txt file of the same name",
    parse_row=parse_row,
    supported_options=frozenset({"prompt"}),
    open_dataset=open_folder,
    write_files=write_files,
)


SPLIT_ALIASES = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Split of a dataset by the name of its folder or file."""

MAX_SHOWN_CLASSES = 20
"""Maximum number of class names in the summary of an import."""

_NO_CLASS_NAMES = frozenset({"images", "img", "masks", "labels", "annotations"})
"""Names of folders, in lower case, that are classes only with `--format classes`."""

_METADATA_NAME = re.compile(r"metadata\.(?:csv|jsonl|parquet)", re.IGNORECASE)


def _order_by_split(root: Path, files: Sequence[Path]) -> tuple[list[Path], int, str]:
    """Order files of split folders: training, then validation."""
    names = {file: file.relative_to(root).parts[:-1] for file in files}
    split_names = {
        file: SPLIT_ALIASES.get(parts[0].lower()) for file, parts in names.items() if parts
    }
    splits = {
        split: [f for f in files if split_names.get(f) == split] for split in split_names.values()
    }
    if len(split_names) < len(files) or None in splits or "train" not in splits:
        return list(files), len(files), ""
    validation = "validation" if "validation" in splits else "test"
    note = f", {validation} folder for validation" if validation in splits else ", training folder"
    if validation == "validation" and "test" in splits:
        note += ", test folder not read"
    return splits["train"] + splits.get(validation, []), len(splits["train"]), note


def open_imagefolder(source: Path, encoding: str | None = None) -> tuple[RowReader, str] | None:
    """Open a Hugging Face ImageFolder as table rows; paths in `file_name` become absolute.

    Args:
        encoding: Encoding of metadata.csv, None to detect it; other files then do not match.
    """
    if not source.is_dir():
        return None
    found = [path for path in list_folder(source).files if _METADATA_NAME.fullmatch(path.name)]
    files, num_train, note = _order_by_split(source, found)
    if encoding is not None and any(file.suffix.lower() != ".csv" for file in files):
        return None
    readers = [_resolve_file_names(open_row_file(file, encoding), file.parent) for file in files]
    first_rows = [next(iter(reader.iter_range(0, 1)), None) for reader in readers]
    if not files or any(row is None or "file_name" not in row.record for row in first_rows):
        return None
    rows = concat_rows(files, readers) if len(files) > 1 else readers[0]
    eval_start = sum(reader.num_rows for reader in readers[:num_train])
    return replace(rows, eval_start=eval_start), f"{files[0].name} with file_name{note}"


def _resolve_file_names(reader: RowReader, folder: Path) -> RowReader:
    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        for row in reader.iter_range(start, stop):
            name = row.record.get("file_name")
            path = str(folder.absolute() / name) if isinstance(name, str) and name else name
            yield replace(row, record={**row.record, "file_name": path})

    return replace(reader, iter_range=iter_range)


def map_imagefolder_columns(
    records: Sequence[Record], columns: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role: of `--map`, else `file_name` and those of known names."""
    if columns.keys() & {"answer", "fields", "box"}:
        return {"image": "file_name", **columns}
    guessed = table.guess_columns(records) | {"image": "file_name"}
    guessed.pop("fields", None)
    table.check_guessed_columns(records, guessed | dict(columns), "--map")
    return guessed | dict(columns)


def open_class_folders(source: Path, *, is_requested: bool = False) -> tuple[RowReader, str] | None:
    """Open class folders of images as rows, with the folder name as label.

    Args:
        is_requested: Ignore other files, accept class names such as `images`, and raise UserError
            if the folders are not classes.
    """
    listing = list_folder(source) if source.is_dir() else None
    images, num_train, note = _order_by_split(source, listing.image_files() if listing else ())
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
    if listing is None or problem:
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
    more = f" and {len(counts) - MAX_SHOWN_CLASSES} more" * (len(counts) > MAX_SHOWN_CLASSES)
    shown = f"classes: {', '.join(counts[:MAX_SHOWN_CLASSES])}{more}"
    reader = rows_from_items(images, make_row)
    rows = replace(reader, eval_start=num_train, text_format=shown)
    return rows, f"one folder per class, {format_count(len(classes), 'class')}{note}"


def parse_class_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from an image and the name of its class folder."""
    label, classes = row.record["label"], row.record["classes"]
    return build_text_example(row.id, row.record["image"], [label], classes, context)


IMAGEFOLDER = DatasetFormat(
    name="imagefolder",
    description="a folder of images with metadata.csv, .jsonl or .parquet (column file_name)",
    parse_row=table.parse_row,
    supported_options=frozenset({"map", "prompt", "boxes"}),
    open_dataset=open_imagefolder,
    map_columns=map_imagefolder_columns,
)

CLASSES = DatasetFormat(
    name="classes",
    description="a folder of images for each class",
    parse_row=parse_class_row,
    supported_options=frozenset({"prompt"}),
    open_dataset=open_class_folders,
    open_requested=partial(open_class_folders, is_requested=True),
)
