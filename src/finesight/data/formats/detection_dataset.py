"""Convert box annotations of images to questions, for all box dataset formats.

With `--box-task detection`, an image yields one question that is answered by all its boxes. With
`--box-task grounding`, it yields one question per label that is answered by the boxes of this
label. Boxes are sorted by label, then from top to bottom and left to right.

The answer for an image without objects is `none`, which is scored as no boxes; grounding skips such
an image. An image whose objects are all of unsupported types is skipped, because `none` would be
wrong.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.data.boxes import BoxConvention, InvalidBoxError
from finesight.data.formats.dataset_format import (
    ImportContext,
    InvalidOptionError,
    RowImages,
    make_text_part,
)
from finesight.data.image_header import (
    TRANSPOSED_ORIENTATIONS,
    CorruptImageError,
    open_image_header,
    read_exif_orientation,
)
from finesight.data.import_example import ImportExample
from finesight.data.limits import MAX_BOXES, check_limit
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import BoxPart, ContentPart, Message, TextPart
from finesight.errors import UserError

DETECTION_PROMPT = "Locate every object of these classes in the image: {labels}."
"""Default question for `--box-task detection`; `--prompt` overrides it."""

GROUNDING_PROMPT = "Locate every {label} in the image."
"""Default question for `--box-task grounding`; `--prompt` overrides it."""

NO_OBJECTS_ANSWER = "none"
"""Answer text for an image without objects."""

REASON_UNSUPPORTED_OBJECTS = "images whose objects are all of unsupported types"
REASON_NO_OBJECTS = "images without objects (skipped by --box-task grounding)"

MAX_CLASSES = 100_000
"""Maximum number of class names in a detection question, which is repeated for each image."""

ImageSize = tuple[int, int]
"""Height and width of an image in pixels."""


@dataclass(frozen=True, slots=True)
class ObjectAnnotation:
    """An annotated object with its class name and box.

    Attributes:
        coordinates: Four coordinates in the convention of the source.
        attributes: Further properties such as `difficult`, stored in the metadata of the sample.
    """

    label: str
    coordinates: Sequence[object]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageAnnotation:
    """Annotations of one image in a box dataset.

    Attributes:
        image: Path or embedded bytes of the image.
        class_names: Class names of the full dataset, listed in detection questions.
        declared_size: Height and width stated by the annotation file, None if missing.
        source_notes: Counts of ignored content, by description.
    """

    image: object
    objects: Sequence[ObjectAnnotation]
    class_names: Sequence[str]
    declared_size: ImageSize | None = None
    meta: Record = field(default_factory=dict)
    source_notes: Counter[str] = field(default_factory=Counter)


def build_detection_examples(
    row: SourceRow,
    annotation: ImageAnnotation,
    context: ImportContext,
    default_convention: BoxConvention,
) -> list[ImportExample]:
    """Build the training examples of an annotated image.

    Images without objects yield none for grounding, and images with only unsupported objects yield
    none.

    Raises:
        InvalidOptionError: The prompt template is invalid.
        InvalidBoxError: A box is outside the image, or the image has another size than declared.
    """
    check_limit(len(annotation.objects), MAX_BOXES, "boxes")
    images = RowImages(context)
    image = images.add_image(annotation.image)
    check_declared_size(annotation.declared_size, images.paths[-1], context)
    boxes_with_attributes = [
        (images.create_box(obj.coordinates, obj.label, default_convention), obj.attributes)
        for obj in annotation.objects
    ]
    boxes_with_attributes.sort(
        key=lambda box_with_attributes: _box_sort_key(box_with_attributes[0])
    )
    context.source_notes.update(annotation.source_notes)
    if not boxes_with_attributes and +annotation.source_notes:
        context.skipped_rows[REASON_UNSUPPORTED_OBJECTS] += 1
        return []
    if context.box_task == "detection":
        if len(annotation.class_names) > MAX_CLASSES:
            raise InvalidOptionError(
                f"a question with {len(annotation.class_names):,} classes",
                where="--box-task detection",
                expected=f"at most {MAX_CLASSES:,}",
                remedy="use --box-task grounding, which asks for one class per question",
            )
        question = format_prompt(
            context.prompt, DETECTION_PROMPT, {"labels": ", ".join(annotation.class_names)}
        )
        has_class_list = "{labels}" in (
            context.prompt if context.prompt is not None else DETECTION_PROMPT
        )
        meta = {
            **annotation.meta,
            **({"classes": list(annotation.class_names)} if has_class_list else {}),
        }
        return [_build_example(row.id, [image, *question], boxes_with_attributes, meta)]
    boxes_by_label: defaultdict[str, list[tuple[BoxPart, Mapping[str, Any]]]] = defaultdict(list)
    for box, attributes in boxes_with_attributes:
        boxes_by_label[str(box.label)].append((box, attributes))
    context.skipped_rows.update([REASON_NO_OBJECTS] if not boxes_by_label else [])
    return [
        _build_example(
            f"{row.id}-{label}",
            [image, *format_prompt(context.prompt, GROUNDING_PROMPT, {"label": label})],
            boxes,
            annotation.meta,
        )
        for label, boxes in boxes_by_label.items()
    ]


def format_prompt(
    prompt: str | None, default_template: str, values: Mapping[str, str]
) -> list[TextPart]:
    """Fill in the placeholders of a prompt template.

    Args:
        prompt: Template from the user, None for the default. "" yields no text part.
        default_template: Default template of the task.
        values: Value per placeholder. Doubled braces in the template are literal braces.

    Raises:
        InvalidOptionError: The template contains unknown placeholders, or lacks {label}, which
            would yield the same question for every label.
        UserError: There are no labels.
    """
    template = default_template if prompt is None else prompt
    allowed = " or ".join(f"{{{name}}}" for name in values)
    try:
        fields = {
            f"{name}{'!' + conversion if conversion else ''}"
            f"{':' + format_spec if format_spec else ''}"
            for _, name, format_spec, conversion in string.Formatter().parse(template)
            if name is not None
        }
    except ValueError as error:
        raise _build_template_error(template, str(error), allowed) from error
    unknown = sorted(fields - values.keys())
    if unknown:
        raise _build_template_error(
            template, f"{{{unknown[0]}}} is an unknown placeholder", allowed
        )
    if "labels" in fields and not values["labels"]:
        raise UserError(
            "no object of the source has a class name",
            expected="objects with labels, or a --prompt without {labels}",
            remedy="check the labels, or set a question with --prompt",
        )
    if "label" in values and "label" not in fields:
        raise _build_template_error(
            template, "it yields the same question for every label", allowed
        )
    text = template.format(**values)
    return [make_text_part(text)] if text else []


def check_declared_size(
    declared: ImageSize | None, image_path: Path, context: ImportContext
) -> None:
    """Raise InvalidBoxError if an image has another size than its annotation file declares.

    The boxes would then be in another coordinate frame: before EXIF rotation, or of a resized
    image.
    """
    try:
        actual = context.images.image_size(image_path)
    except CorruptImageError:
        if context.lenient:
            return
        raise
    if declared is None or declared == actual:
        return
    message = f"the boxes refer to an image of {declared[1]} x {declared[0]} pixels, the image has "
    message += f"{actual[1]} x {actual[0]}"
    if declared == actual[::-1] and _is_transposed(image_path):
        raise InvalidBoxError(
            f"{message} after EXIF rotation: it was annotated before rotation",
            where=str(image_path),
            expected="boxes in the image after EXIF rotation",
            remedy="remove the EXIF orientation from the images, so that they match the "
            "annotations, or rotate the boxes",
        )
    raise InvalidBoxError(
        message,
        where=str(image_path),
        expected="the annotated image in its original size",
        remedy="use the annotated images instead of resized or cropped copies",
    )


def _is_transposed(image_path: Path) -> bool:
    with open_image_header(image_path) as image:
        return read_exif_orientation(image) in TRANSPOSED_ORIENTATIONS


def _box_sort_key(box: BoxPart) -> tuple[str, float, float, float, float]:
    x1, y1, x2, y2 = box.xyxy
    return (str(box.label), y1, x1, y2, x2)


def _build_example(
    sample_id: str,
    question: Sequence[ContentPart],
    boxes_with_attributes: Sequence[tuple[BoxPart, Mapping[str, Any]]],
    meta: Record,
) -> ImportExample:
    answer: tuple[ContentPart, ...] = tuple(box for box, _ in boxes_with_attributes) or (
        TextPart(text=NO_OBJECTS_ANSWER),
    )
    attributes = [dict(box_attributes) for _, box_attributes in boxes_with_attributes]
    full_meta = {**meta, **({"boxes": attributes} if any(attributes) else {})}
    return ImportExample(
        sample_id, (Message(role="user", content=tuple(question)),), (answer,), meta=full_meta
    )


def _build_template_error(template: str, reason: str, allowed: str) -> InvalidOptionError:
    return InvalidOptionError(
        f"the template {template[:80]!r}: {reason}",
        where="--prompt",
        expected=f"text with {allowed}",
        remedy="correct the template; {{ and }} are literal braces",
    )
