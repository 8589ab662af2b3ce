"""FiftyOneImageDetectionDataset and FiftyOneImageClassificationDataset: labels.json in a folder.

{"classes": ["dog"], "labels": {"a": [{"label": 0, "bounding_box": [0.1, 0.2, 0.3, 0.05]}]}}
{"classes": ["cat", "dog"], "labels": {"a": 1, "b": null}}

A box is its top left corner and size, scaled to 1. A label is a class name or an index into
`classes`. Keys are image paths in the folder `data` without suffix. A file data.json with the image
path of each key replaces the folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from finesight.errors import UserError, format_count
from finesight.ingest.folder_listing import list_folder
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.ingest.formats.image_annotations import (
    ObjectAnnotation,
    build_detection_examples,
    build_text_example,
    enclose_shape,
)
from finesight.ingest.formats.json_annotations import read_document
from finesight.ingest.formats.row_keys import count_keys
from finesight.ingest.row_reader import RowReader, SourceRow, rows_from_items
from finesight.samples.frames import get_frame

LABELS_FILE, MANIFEST_FILE, DATA_FOLDER = "labels.json", "data.json", "data"
_ITEM_KEYS = ("label", "bounding_box", "attributes")
FIFTYONE_FRAME = get_frame("xywh", "1")
REASON_NO_LABEL = "images without a label"


def _open_fiftyone(source: Path) -> tuple[RowReader, str] | None:
    """Open a folder with labels.json, or this file, as rows, one per image."""
    file = source / LABELS_FILE if source.is_dir() else source
    document = read_document(file, b'"labels"')
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
    reason = f"{LABELS_FILE} with labels: FiftyOne {kind}, {format_count(len(classes), 'class')}"
    other_keys: Counter[str] = Counter()
    count_keys([dict.fromkeys(document, 1)], ("classes", "labels"), "files", other_keys)
    return replace(rows_from_items(list(labels), make_row), other_keys=other_keys), reason


def _parse_fiftyone(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a FiftyOne dataset."""
    record = row.record
    items, labels, classes = record["items"], record["labels"], record["classes"]
    if items is None or not (items or record["is_detection"]):
        context.skipped_rows[REASON_NO_LABEL] += 1
        return []
    if None in labels:
        item = items[labels.index(None)]
        raise UserError(
            f"the label {str(item)[:80]}",
            expected="a class name, or an index into classes",
            remedy="correct the label, or remove it",
        )
    all_fields = [item if isinstance(item, dict) else {} for item in items]
    used_keys = _ITEM_KEYS if record["is_detection"] else ("label",)
    count_keys(all_fields, used_keys, "labels", context.other_keys)
    if not record["is_detection"]:
        answer, meta = ", ".join(labels), {"classes": classes}
        return [build_text_example(row.id, record["path"], [answer], classes, context, meta)]
    objects = []
    for fields, label in zip(all_fields, labels, strict=True):
        attributes = fields.get("attributes")
        attributes = attributes if isinstance(attributes, dict) else {}
        box: Sequence[object] | None = as_list(fields.get("bounding_box"))
        if not box or len(box) > 4:
            kind = f"boxes of {len(box)} values" if box else "labels without a box"
            box = enclose_shape(kind, None, context)
        objects.append(ObjectAnnotation(label, box, attributes=attributes))
    return build_detection_examples(row, context, FIFTYONE_FRAME, record["path"], objects)


def _get_label(item: object, classes: Sequence[object]) -> str | None:
    """Return the class name of a label, or None if it is invalid."""
    value = item.get("label") if isinstance(item, dict) else item
    if isinstance(value, int) and not isinstance(value, bool):
        return str(classes[value]) if 0 <= value < len(classes) else None
    return value if isinstance(value, str) and value.strip() else None


def _find_images(folder: Path) -> dict[str, Path]:
    """Map the key of each image to its path, of data.json or of the folder data."""
    data = folder / DATA_FOLDER
    if not data.is_dir():
        names = read_document(folder / MANIFEST_FILE, b"{") or {}
        return {_get_key(key): folder / str(name) for key, name in names.items()}
    return {_get_key(file.relative_to(data).as_posix()): file for file in list_folder(data).files}


def _get_key(name: str) -> str:
    return normalize("NFC", os.path.splitext(name)[0])


COMPONENT = DatasetFormat(
    name="fiftyone",
    description='a folder with labels.json, {"classes": [...], "labels": {"a": ...}}, and data/',
    parse_row=_parse_fiftyone,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_fiftyone,
    position=60,
)
