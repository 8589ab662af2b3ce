"""LabelMe: a folder of JSON files, one per image, with `shapes`.

A rectangle is given by two opposite corners in any order; some tools write all four. Coordinates
are in pixels, 0-based, after EXIF rotation. The image path is relative to the JSON file. If the
image is missing, it is saved from `imageData`. Images without a JSON file are ignored.

If no file has shapes, the labels are `flags`, or a question and its answer in `vqaData`:

- If each image has exactly one flag that is true, this is its class.
- If an image has several, or there is only one flag, the answer is a JSON object of all flags.
- Other keys that may contain labels are errors.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import find_existing, parse_unique_json
from finesight.ingest.folder_listing import open_annotation_files
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
    InvalidOptionError,
    RowImages,
    as_list,
    make_text_part,
)
from finesight.ingest.formats.image_annotations import (
    NO_OUTLINES,
    BoolMask,
    ObjectAnnotation,
    Outlines,
    build_detection_examples,
    build_text_example,
    enclose_shape,
    list_image_names,
    trace_mask,
)
from finesight.ingest.formats.row_keys import ROWS, count_keys, has_value, sort_keys
from finesight.ingest.row_reader import Record, RowReader, SourceRow
from finesight.samples.boxes import find_bounds, translate_shape_errors
from finesight.samples.frames import PIXELS
from finesight.samples.image_file import MAX_IMAGE_PIXELS
from finesight.samples.line_index import MAX_LINE_BYTES
from finesight.samples.sample import Message, check_json, read_data_file, translate_errors

_DOCUMENT_KEYS = (
    "version",
    "shapes",
    "imagePath",
    "imageData",
    "imageHeight",
    "imageWidth",
    "flags",
    "vqaData",
)
_SETTING_KEYS = frozenset(("lineColor", "fillColor", "checked"))
"""Keys of LabelMe and its variants that contain no label."""

_SHAPE_KEYS = ("label", "points", "shape_type", "mask")

POINT_TYPES = ("point", "points")


FLAGS_PROMPT = (
    "Which of these apply to the image: {labels}? Answer with a JSON object of true or false."
)
"""Default question about flags that do not exclude each other; `--prompt` overrides it."""

NOTE_FLAGS = "images with flags next to shapes (in meta)"
NOTE_QUESTIONS = "questions of vqaData next to shapes (not imported)"
REASON_IGNORED = "images with the flag __ignore__"
IGNORE_FLAG = "__ignore__"
_PAIR_KEYS = ("question", "answer")
_CHOICE_KEYS = frozenset(("options", "choices", "candidates", "context", "hint"))

ROWS_REMEDY = (
    'write a row per image, such as {"image": "a.jpg", "question": "...", "answer": "..."}, to a'
    " .jsonl file, and import this file"
)


@dataclass(slots=True)
class FolderLabels:
    """Labels of all LabelMe files of a folder.

    Attributes:
        flags: Names of the flags of images, except `__ignore__`.
        num_true: Numbers of flags that are true in a file, except 0.
        has_questions: Whether any file has `vqaData`.
    """

    flags: set[str] = field(default_factory=set)
    num_true: set[int] = field(default_factory=set)
    has_shapes: bool = False
    has_questions: bool = False

    @property
    def is_single_class(self) -> bool:
        """Return whether the only flag of an image that is true is its class."""
        return len(self.flags) > 1 and self.num_true == {1}

    def read_classes(self, file: Path) -> tuple[bool, set[str], set[str]]:
        """Return whether a file is of LabelMe, and its classes and points; collect its labels."""
        record = _read_record(file)
        self.has_shapes |= bool(record["shapes"])
        self.has_questions |= has_value(record.get("vqaData"))
        flags = record.get("flags")
        if isinstance(flags, dict) and not flags.get(IGNORE_FLAG):
            names = flags.keys() - {IGNORE_FLAG}
            self.flags |= names
            num_true = sum(flags[name] is True for name in names)
            self.num_true |= {num_true} - {0}
        return _read_classes(record)

    def describe(self) -> str:
        """Return the kind of labels in files without shapes."""
        if self.has_questions:
            return "questions in vqaData"
        flags = format_count(len(self.flags), "flag")
        if self.is_single_class:
            return f"{flags}, one class per image"
        return f"{flags}, as JSON"


def _open_labelme(source: Path) -> tuple[RowReader, str] | None:
    """Open the LabelMe JSON files of a folder, or a single one, as rows."""
    labels = FolderLabels()
    description = "JSON files with shapes: LabelMe"
    opened = open_annotation_files(source, ".json", description, b'"shapes"', labels.read_classes)
    if opened is None:
        return None
    rows, detected_by = opened
    if not labels.has_shapes and (labels.flags or labels.has_questions):
        detected_by = f"JSON files without shapes: LabelMe, {labels.describe()}"

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        for row in rows.iter_range(start, stop):
            yield replace(row, record={**row.record, "labels": labels})

    return replace(rows, iter_range=iter_range), detected_by


def _parse_labelme(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a LabelMe file."""
    file = Path(row.record["file"])
    labels: FolderLabels = row.record["labels"]
    record = _read_record(file)
    count_keys([record], _DOCUMENT_KEYS, "files", context.other_keys)
    count_keys(record["shapes"], _SHAPE_KEYS, "shapes", context.other_keys)
    flags = _read_flags(record)
    if flags.pop(IGNORE_FLAG, False):
        context.skipped_rows[REASON_IGNORED] += 1
        return []
    if not record["shapes"]:
        _check_other_labels(record, flags, labels)
    meta: Record = {}
    if flags:
        meta["flags"] = flags
    if not labels.has_shapes and (labels.flags or labels.has_questions):
        if context.box_task != "detection":
            raise InvalidOptionError(
                f"no file has shapes, but {labels.describe()}",
                where=f"--box-task {context.box_task}",
                expected="shapes in the files",
                remedy="omit the option",
            )
        image = _find_image(file, record)
        if labels.has_questions:
            return _parse_questions(row, record, image, context, meta)
        return [_parse_flags(row, flags, image, context)]
    objects = [_parse_shape(shape, context) for shape in record["shapes"]]
    context.row_notes[NOTE_QUESTIONS] += has_value(record.get("vqaData"))
    context.row_notes[NOTE_FLAGS] += bool(flags)
    return build_detection_examples(
        row,
        context,
        PIXELS,
        _find_image(file, record),
        objects,
        declared_size=(record.get("imageHeight"), record.get("imageWidth")),
        meta=meta,
    )


def _read_flags(record: Record) -> dict[str, bool]:
    """Return the flags of an image. Raises UserError for other values than true and false."""
    flags = record.get("flags")
    if not has_value(flags):
        return {}
    if isinstance(flags, dict) and all(isinstance(value, bool) for value in flags.values()):
        return dict(flags)
    if record["shapes"]:
        return {}  # counted as a further key
    raise UserError(
        f"the flags {str(flags)[:80]}",
        expected='flags as LabelMe saves them, such as {"cat": true, "dog": false}',
        remedy=f"correct the flags, or {ROWS_REMEDY}",
    )


def _check_other_labels(record: Record, flags: dict[str, bool], labels: FolderLabels) -> None:
    """Raise UserError for labels of a file without shapes, whose answer would be `none`."""
    found = []
    if any(flags.values()):
        found.append("flags")
    if has_value(record.get("vqaData")):
        found.append("vqaData")
    if labels.has_shapes and found:
        raise UserError(
            f"no shapes, but {' and '.join(found)}, in contrast to other files",
            expected="labels of one kind in all files of a folder",
            remedy="move the files to a folder for each kind of labels, with their images, and"
            " import each; or remove the labels of the other kind",
        )
    if labels.has_shapes or labels.flags or labels.has_questions:
        return
    for key, value in record.items():
        if key not in _DOCUMENT_KEYS and key not in _SETTING_KEYS and has_value(value):
            raise UserError(
                f"no shapes, but the key {key!r} with {str(value)[:60]}",
                expected="labels as shapes, as flags, or as question and answer in vqaData",
                remedy=f"{ROWS_REMEDY}; or remove the key, if it contains no label",
            )


def _parse_flags(
    row: SourceRow, flags: dict[str, bool], image: str | bytes, context: ImportContext
) -> ImportExample:
    """Build the example of an image whose flags are its labels."""
    labels: FolderLabels = row.record["labels"]
    names = sorted(labels.flags)
    needs_flag = labels.is_single_class or not labels.num_true
    if not flags or (needs_flag and not any(flags.values())):
        raise UserError(
            f"the flags {str(flags)[:80]}, none of which is true",
            expected=f"a true flag, such as {names[0]}",
            remedy="set the flag in LabelMe, remove the file, or leave out such files with"
            " --on-invalid-row skip",
        )
    if labels.is_single_class:
        answer = next(name for name, is_true in flags.items() if is_true)
        meta = {"classes": names}
        return build_text_example(row.id, image, [answer], names, context, meta)
    # Each image has flags of its own, so the question lists only these.
    template = FLAGS_PROMPT if context.prompt is None else context.prompt
    own_context = replace(context, prompt=template)
    text = json.dumps(flags, ensure_ascii=False)
    return build_text_example(row.id, image, [text], list(flags), own_context)


def _parse_questions(
    row: SourceRow, record: Record, image: str | bytes, context: ImportContext, meta: Record
) -> list[ImportExample]:
    """Build an example for each question and its answer in `vqaData`."""
    pairs = as_list(record.get("vqaData")) or [None]
    image_part = RowImages(context).add_image(image)
    image_names = (str(record.get("imagePath") or row.id),)
    examples = []
    for number, value in enumerate(pairs, start=1):
        data = _read_pair(value)
        other_meta = sort_keys(data, _PAIR_KEYS, ROWS, context.other_keys, image_names)
        question = make_text_part(data["question"])
        user = Message(role="user", content=context.add_prompt((image_part, question)))
        answer = (make_text_part(data["answer"]),)
        sample_id = row.id if len(pairs) == 1 else f"{row.id}-{number}"
        examples.append(ImportExample(sample_id, (user,), (answer,), meta=meta | other_meta))
    return examples


def _read_pair(value: object) -> Record:
    """Return a question and its answer by keys in lower case. Raises UserError for other data."""
    pair: Record = {}
    if isinstance(value, dict):
        pair = {key.lower(): item for key, item in value.items()}
    texts = [pair.get(key) for key in _PAIR_KEYS]
    is_complete = all(isinstance(text, str) and text.strip() for text in texts)
    has_choices = any(has_value(pair.get(key)) for key in _CHOICE_KEYS)
    if is_complete and not has_choices:
        return pair
    raise UserError(
        f"the vqaData {str(value)[:80]}",
        expected='a question and its answer, {"question": "...", "answer": "..."}',
        remedy="correct vqaData, leave out such files with --on-invalid-row skip, or"
        f" {ROWS_REMEDY}",
    )


def _read_record(file: Path) -> Record:
    """Read and validate a LabelMe file."""
    content = read_data_file(file, MAX_LINE_BYTES)
    check_json(content, str(file))
    remedy = "save it again, or remove it from the folder"
    with translate_errors("broken JSON", "a file as LabelMe saves it", remedy):
        record = parse_unique_json(content)
    shapes = record.get("shapes") if isinstance(record, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(
            f"no list of shapes in {str(record)[:60]}",
            expected='{"shapes": [...], "imagePath": ...} as LabelMe saves it',
            remedy="remove the file from the folder",
        )
    return dict(record)


def _read_classes(record: Record) -> tuple[bool, set[str], set[str]]:
    labels: tuple[set[str], set[str]] = (set(), set())
    for shape in record["shapes"]:
        if isinstance(shape.get("label"), str):
            labels[_get_shape_type(shape) in POINT_TYPES].add(shape["label"])
    is_labelme = not {"imagePath", "imageData"}.isdisjoint(record)
    return is_labelme or any("points" in shape for shape in record["shapes"]), *labels


def _get_shape_type(shape: Record) -> str:
    # The first versions of LabelMe supported only polygons and wrote no type.
    return str(shape.get("shape_type") or "polygon")


def _parse_shape(shape: Record, context: ImportContext) -> ObjectAnnotation:
    shape_type, points = _get_shape_type(shape), shape.get("points", ())
    bounds = None if shape_type in POINT_TYPES else find_bounds(points or (), shape)
    with translate_shape_errors(shape, "a label", shape_type):
        if not str.strip(shape["label"]):
            raise ValueError(f"the label {shape['label']!r}")
    if shape_type == "circle" and isinstance(points, list) and len(points) > 1:
        (x, y), edge, *_ = ((float(x), float(y)) for x, y in points)
        radius = math.dist((x, y), edge)
        bounds = [x - radius, y - radius, x + radius, y + radius]
    is_point = shape_type in POINT_TYPES
    named = [(shape["label"], as_list(point)) for point in as_list(points) if is_point]
    outlines = NO_OUTLINES
    if shape_type in ("polygon", "oriented_rectangle"):
        outlines = Outlines([points])
    elif shape_type == "mask" and context.box_task == "polygons":
        with translate_shape_errors(shape, "two points, and `mask`, a PNG file in base64"):
            (left, top), _ = points
            outlines = trace_mask(_decode_mask(shape["mask"]), left, top)
    if shape_type != "rectangle":
        kind = "polygons" if shape_type == "polygon" else f"shapes of type {shape_type}"
        bounds = enclose_shape(kind, bounds, context, outlines)
    return ObjectAnnotation(shape["label"], bounds, outlines, points=named)


def _decode_mask(text: str) -> BoolMask:
    """Decode a PNG file in base64. Raises ValueError if it is invalid or too large."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
            if math.prod(image.size) > MAX_IMAGE_PIXELS:
                raise ValueError(f"a mask of {image.size}")
            return np.asarray(image.convert("L")) > 0
    except Exception as error:  # Pillow raises many error types
        raise ValueError(f"a mask that cannot be decoded ({error})") from error


def _find_image(file: Path, record: Record) -> str | bytes:
    """Return the image path, or the bytes of `imageData` if the image is missing.

    The image path in the record may have Windows separators. Without one, the image has the name of
    the JSON file.
    """
    names = [str(record["imagePath"])] if record.get("imagePath") else list_image_names(file)
    path = file.parent / names[0]
    for found in (find_existing(file.parent, name) for name in names):
        if found is not None and os.path.isfile(found):
            return str(found)
    data = record.get("imageData")
    if not isinstance(data, str) or not data:
        return str(path)  # the image resolver reports the path
    expected, remedy = "image bytes in base64, or null", f"move the image to {path}"
    with translate_errors("imageData is not base64", expected, remedy):
        return base64.b64decode(data, validate=True)


COMPONENT = DatasetFormat(
    name="labelme",
    description='a folder of JSON files, {"imagePath": "a.jpg", "shapes": [...]}',
    parse_row=_parse_labelme,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_labelme,
    position=40,
)
