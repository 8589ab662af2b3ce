"""FiftyOneImageDetectionDataset and FiftyOneImageClassificationDataset: a folder with labels.json.

{"classes": ["dog"], "labels": {"a": [{"label": 0, "bounding_box": [0.1, 0.2, 0.3, 0.05]}]}}
{"classes": ["cat", "dog"], "labels": {"a": 1, "b": null}}

A box is its top left corner and size, scaled to 1. A label is a class name or an index into
`classes`. Keys are image paths in the folder `data` without suffix. A file data.json with the image
path of each key replaces the folder. Images without a label are skipped and counted. The attributes
of a box are stored in the metadata; its confidence is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from finesight.bounded_files import parse_unique_json
from finesight.data.boxes import BoxConvention
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.data.formats.image_annotations import (
    ImageAnnotation,
    ImageRecord,
    ObjectAnnotation,
    build_detection_examples,
    build_text_example,
    collect_classes,
    group_answers_by_image,
    make_unique_stem,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.row_reader import (
    Record,
    RowReader,
    SourceRow,
    is_json_object,
    list_folder,
    rows_from_items,
)
from finesight.data.sample import LocatedSample, read_data_file
from finesight.errors import UserError

LABELS_FILE, MANIFEST_FILE, DATA_FOLDER = "labels.json", "data.json", "data"
_ITEM_KEYS = ("label", "bounding_box", "attributes")
BOX_CONVENTION = BoxConvention(format="xywh", units="1")
REASON_UNLABELED = "images without a label"


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open a folder with labels.json, or this file, as rows, one per image.

    Returns:
        The rows and the reason for the match, or None if there is no such document.
    """
    file = source / LABELS_FILE if source.is_dir() else source
    document = _read_object(file) if is_json_object(file) else None
    labels = document.get("labels") if document else None
    if document is None or not isinstance(labels, dict) or not labels:
        return None
    items = [item for target in labels.values() for item in as_list(target)]
    is_detection = not items or any(isinstance(i, dict) and "bounding_box" in i for i in items)
    declared = as_list(document.get("classes"))
    names = {_get_label(item, declared) for item in items}
    classes = list(map(str, declared)) or sorted(name for name in names if name)
    paths = _find_images(file.parent)

    def make_row(row_number: int, key: str) -> SourceRow:
        target = labels[key]
        record = {
            "id": PurePosixPath(key).name,
            "path": str(paths.get(normalize("NFC", key), file.parent / DATA_FOLDER / key)),
            "items": None if target is None else as_list(target),
            "labels": [_get_label(item, declared) for item in as_list(target)],
            "classes": classes,
            "is_detection": is_detection,
        }
        return SourceRow(row_number, f"label {key!r}", record, source.stem)

    kind = "detection" if is_detection else "classification"
    reason = f"{LABELS_FILE} with labels: FiftyOne {kind}, {len(classes)} classes"
    return rows_from_items(list(labels), make_row), reason


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a FiftyOne dataset."""
    record = row.record
    items, labels, classes = record["items"], record["labels"], record["classes"]
    if items is None or not (items or record["is_detection"]):
        context.skipped_rows[REASON_UNLABELED] += 1
        return []
    if None in labels:
        item = items[labels.index(None)]
        raise UserError(
            f"the label {str(item)[:80]}",
            expected="a class name, or an index into classes",
            remedy="correct the label, or remove it",
        )
    if not record["is_detection"]:
        answer, meta = ", ".join(labels), {"classes": classes}
        return [build_text_example(row.id, record["path"], [answer], classes, context, meta)]
    objects = []
    for item, label in zip(items, labels, strict=True):
        # Without a box, the list of its coordinates is empty, which is an error of the row.
        fields = item if isinstance(item, dict) else {}
        count_keys([fields], _ITEM_KEYS, "labels", context.other_keys)
        attributes = fields.get("attributes")
        box = as_list(fields.get("bounding_box"))
        attributes = attributes if isinstance(attributes, dict) else {}
        objects.append(ObjectAnnotation(label, box, attributes))
    annotation = ImageAnnotation(record["path"], objects, classes)
    return build_detection_examples(row, annotation, context, BOX_CONVENTION)


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write labels.json, of a detection dataset if any answer contains a box, and data.json."""
    records, is_detection = group_answers_by_image(samples, context, {"boxes"})
    answers = sorted({answer for record in records for answer in record.answers})
    classes = list(dict.fromkeys([*collect_classes(records), *answers]))
    indices = {name: index for index, name in enumerate(classes)}
    used_stems: set[str] = set()
    labels: dict[str, Any] = {}
    manifest: dict[str, str] = {}
    for record in records:
        key = make_unique_stem(record.image_path.stem, used_stems)
        # A reader removes the suffix of the keys of this file.
        manifest[f"{key}{record.image_path.suffix}"] = context.image_name(record.image_path)
        if is_detection:
            labels[key] = list(_iter_boxes(record, indices, context))
            continue
        if len(record.answers) != 1:
            raise UserError(
                f"{len(record.answers)} answers about {record.image_path.name}",
                where=str(record.image_path),
                expected="one class per image",
                remedy="export as coco, which supports several captions per image",
            )
        labels[key] = indices[record.answers[0]]
    document = {"classes": classes, "labels": labels}
    kind = "FiftyOneImageDetectionDataset" if is_detection else "FiftyOneImageClassificationDataset"
    context.notes.append(f"import the folder into FiftyOne as {kind} with data_path='data.json'")
    yield LABELS_FILE, (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()
    yield MANIFEST_FILE, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode()


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        document = parse_unique_json(read_data_file(file))
    except ValueError:
        return None  # the row reader reports it
    return document if isinstance(document, dict) else None


def _get_label(item: object, classes: Sequence[object]) -> str | None:
    """Return the class name of a label, or None if it is invalid."""
    value = item.get("label") if isinstance(item, dict) else item
    if isinstance(value, int) and not isinstance(value, bool):
        return str(classes[value]) if 0 <= value < len(classes) else None
    return value if isinstance(value, str) and value.strip() else None


def _find_images(folder: Path) -> dict[str, Path]:
    """Map the key of each image to its path, of data.json or of the folder data."""
    manifest = folder / MANIFEST_FILE
    if is_json_object(manifest) and not (folder / DATA_FOLDER).is_dir():
        names = _read_object(manifest) or {}
        return {_get_key(key): folder / str(name) for key, name in names.items()}
    files = list_folder(folder / DATA_FOLDER).files if (folder / DATA_FOLDER).is_dir() else ()
    return {_get_key(file.relative_to(folder / DATA_FOLDER).as_posix()): file for file in files}


def _get_key(name: str) -> str:
    return normalize("NFC", os.path.splitext(name)[0])


def _iter_boxes(
    record: ImageRecord, indices: Mapping[str, int], context: ExportContext
) -> Iterator[Record]:
    height, width = context.image_size(record.image_path)
    for box in record.boxes:
        x1, y1, x2, y2 = box.xyxy
        bounds = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        item: Record = {"label": indices[box.label], "bounding_box": bounds}
        yield item | ({"attributes": dict(box.attributes)} if box.attributes else {})


FORMAT = DatasetFormat(
    name="fiftyone",
    description='a folder with labels.json, {"classes": [...], "labels": {"a": ...}}, and data/',
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_folder,
    write_files=write_files,
)
