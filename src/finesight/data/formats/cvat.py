"""CVAT for images 1.1: an XML file with the shapes and tags of all images.

<annotations><version>1.1</version>
 <image id="0" name="a.jpg" width="640" height="480">
  <box label="dog" occluded="0" xtl="48" ytl="240" xbr="195" ybr="371">
   <attribute name="breed">Pug</attribute></box></image></annotations>

Polygons, polylines, masks and rotated boxes are converted to their bounding boxes. Other shapes and
tags have no box. Attributes and `occluded` are stored in the metadata. In a file without shapes,
the tags of an image are its class. Images are searched as by `find_image_folder`. XML with a
DOCTYPE is rejected, because it could declare entities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from finesight.bounded_files import find_existing
from finesight.data.boxes import BoxConvention, InvalidBoxError, find_bounds
from finesight.data.formats.coco import find_image_folder
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
)
from finesight.data.formats.image_annotations import (
    ImageAnnotation,
    ImageRecord,
    ObjectAnnotation,
    build_detection_examples,
    build_text_example,
    collect_classes,
    enclose_shape,
    group_answers_by_image,
    parse_declared_size,
    parse_integer,
    require_inside_output,
    round_coordinate,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.formats.voc import add_child, parse_xml
from finesight.data.image_resolver import IMAGES_FOLDER
from finesight.data.row_reader import (
    SNIFF_BYTES,
    RowReader,
    SourceRow,
    list_folder,
    rows_from_items,
)
from finesight.data.sample import LocatedSample, read_data_file
from finesight.errors import UserError

CORNERS = ("xtl", "ytl", "xbr", "ybr")
REASON_NO_TAG = "images without a tag"
MAX_NAME_CHARS = 64
"""Maximum number of characters of a label name in CVAT."""

_EXPECTED = "CVAT for images 1.1: <annotations> with <image> elements"


def open_document(source: Path) -> tuple[RowReader, str] | None:
    """Open a CVAT file, or the only XML file of a folder, as rows, one per image.

    Returns:
        The rows and the reason for the match, or None if the file is not from CVAT.
    """
    files = list_folder(source).files_with_suffix(".xml") if source.is_dir() else [source]
    if len(files) != 1 or files[0].suffix.lower() != ".xml" or not files[0].is_file():
        return None
    content = read_data_file(files[0])
    if b"<annotations" not in content[:SNIFF_BYTES]:
        return None
    root = parse_xml(content, _EXPECTED)
    images = root.findall("image")
    if not images:
        problem = "tracks of a video" if root.find("track") is not None else "no image"
        raise UserError(
            f"the file contains {problem}",
            where=str(files[0]),
            expected=_EXPECTED,
            remedy="export the task as `CVAT for images 1.1`",
        )
    folder = find_image_folder(files[0], [image.get("name", "") for image in images])
    shapes = [shape for image in images for shape in image if shape.tag not in ("tag", "points")]
    labeled = shapes or [tag for image in images for tag in image.iterfind("tag")]
    declared = [label.text or "" for label in root.iterfind("meta/*/labels/label/name")]
    used = {shape.get("label", "") for shape in labeled}
    classes = [name for name in declared if name] or sorted(used - {""})

    def make_row(row_number: int, image: ElementTree.Element) -> SourceRow:
        name = image.get("name", "").replace("\\", "/")
        record = {
            "id": PurePosixPath(name).stem,
            "path": str(find_existing(folder, name) or folder / name),
            "image": image,
            "classes": classes,
            "is_detection": bool(shapes),
        }
        return SourceRow(row_number, f"image {image.get('id')} ({name})", record, source.stem)

    task = "shapes" if shapes else "tags"
    reason = (
        f"<annotations> with <image>: CVAT {task} of {len(classes)} classes, images in {folder}"
    )
    return rows_from_items(images, make_row), reason


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a CVAT file."""
    image, classes = row.record["image"], row.record["classes"]
    if not row.record["is_detection"]:
        tags = [tag.get("label", "") for tag in image.iterfind("tag")]
        if not any(tags):
            context.skipped_rows[REASON_NO_TAG] += 1
            return []
        answer, meta = ", ".join(filter(None, tags)), {"classes": classes}
        return [build_text_example(row.id, row.record["path"], [answer], classes, context, meta)]
    source_notes: Counter[str] = Counter()
    objects = [_parse_shape(shape, source_notes) for shape in image]
    used = (*CORNERS, "label", "occluded", "rotation", "points", "source", "z_order")
    count_keys((shape.attrib for shape in image), used, "shapes", context.other_keys)
    annotation = ImageAnnotation(
        row.record["path"],
        objects,
        classes,
        parse_declared_size(
            parse_integer(image.get("height", "")), parse_integer(image.get("width", ""))
        ),
        source_notes=source_notes,
    )
    return build_detection_examples(row, annotation, context, BoxConvention())


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write the file annotations.xml, with boxes, or with tags if no answer contains a box."""
    records, _ = group_answers_by_image(samples, context, {"boxes"})
    answers = dict.fromkeys(answer for record in records for answer in record.answers)
    classes = list(dict.fromkeys([*collect_classes(records), *answers]))
    _check_names(classes)
    root = ElementTree.Element("annotations")
    add_child(root, "version", "1.1")
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    add_child(task, "name", "finesight")
    add_child(task, "size", len(records))
    labels = ElementTree.SubElement(task, "labels")
    for name in classes:
        label = ElementTree.SubElement(labels, "label")
        add_child(label, "name", name)
        attributes = ElementTree.SubElement(label, "attributes")
        boxes = [box for record in records for box in record.boxes if box.label == name]
        for attribute_name in sorted({key for box in boxes for key in box.attributes}):
            if attribute_name == "occluded":
                continue
            attribute = ElementTree.SubElement(attributes, "attribute")
            add_child(attribute, "name", attribute_name)
            add_child(attribute, "mutable", "False")
            add_child(attribute, "input_type", "text")
    for index, record in enumerate(records):
        root.append(_build_image(index, record, context))
    ElementTree.indent(root)
    yield "annotations.xml", bytes(ElementTree.tostring(root, "utf-8")) + b"\n"


def _parse_shape(shape: ElementTree.Element, source_notes: Counter[str]) -> ObjectAnnotation:
    label = shape.get("label", "").strip()
    try:
        bounds = _find_bounds(shape, source_notes)
        if not label:
            raise ValueError("no label")
    except ValueError as error:
        raise InvalidBoxError(
            f"the {shape.tag} {str(shape.attrib)[:80]}",
            expected="a label and numeric coordinates",
            remedy="correct the shape, or remove it",
        ) from error
    attributes: dict[str, str | int] = {
        attribute.get("name", ""): attribute.text or "" for attribute in shape.iterfind("attribute")
    }
    if shape.get("occluded") == "1":
        attributes["occluded"] = 1
    return ObjectAnnotation(label, bounds, attributes)


def _find_bounds(shape: ElementTree.Element, source_notes: Counter[str]) -> list[float] | None:
    """Return the enclosing box of a shape, or None. Raises ValueError for invalid numbers."""
    kind, bounds = f"shapes of type {shape.tag}", None
    if shape.tag in ("polygon", "polyline"):
        pairs = (pair.split(",") for pair in shape.get("points", "").split(";"))
        bounds = find_bounds(pairs, shape.attrib)
        kind = "polygons" if shape.tag == "polygon" else kind
    elif shape.tag == "mask":
        x, y, width, height = (
            float(shape.get(side, "")) for side in ("left", "top", "width", "height")
        )
        bounds = [x, y, x + width, y + height]
    elif shape.tag == "box":
        x1, y1, x2, y2 = (float(shape.get(corner, "")) for corner in CORNERS)
        angle = math.radians(float(shape.get("rotation", "0")))
        if not angle:
            return [x1, y1, x2, y2]
        # Around the center.
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        dx = ((x2 - x1) * cos + (y2 - y1) * sin) / 2
        dy = ((x2 - x1) * sin + (y2 - y1) * cos) / 2
        center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
        kind = "rotated rectangles"
        bounds = [center_x - dx, center_y - dy, center_x + dx, center_y + dy]
    return enclose_shape(kind, bounds, source_notes)


def _check_names(classes: Sequence[str]) -> None:
    long_names = [name for name in classes if len(name) > MAX_NAME_CHARS]
    if long_names:
        raise UserError(
            f"the label {long_names[0][:60]!r}... has {len(long_names[0])} characters",
            where="--to cvat",
            expected=f"boxes with labels or classes of at most {MAX_NAME_CHARS} characters",
            remedy="export texts to label-studio or coco",
        )


def _build_image(index: int, record: ImageRecord, context: ExportContext) -> ElementTree.Element:
    height, width = context.image_size(record.image_path)
    sides = {"width": str(width), "height": str(height)}
    path = require_inside_output(record.image_path, context, "CVAT")
    # As in exports of CVAT, where names are relative to the folder images.
    name = path.removeprefix(f"{IMAGES_FOLDER}/")
    image = ElementTree.Element("image", {"id": str(index), "name": name, **sides})
    for box in record.boxes:
        corners = map(str, map(round_coordinate, box.xyxy))
        occluded = str(int(box.attributes.get("occluded") in (1, "1", True)))
        options = {"label": box.label, "source": "manual", "occluded": occluded, "z_order": "0"}
        element = ElementTree.SubElement(
            image, "box", {**options, **dict(zip(CORNERS, corners, strict=True))}
        )
        for name, value in box.attributes.items():
            if name != "occluded":
                ElementTree.SubElement(element, "attribute", name=name).text = str(value)
    for answer in record.answers:
        ElementTree.SubElement(image, "tag", label=answer, source="manual")
    return image


FORMAT = DatasetFormat(
    name="cvat",
    description='an .xml file of <annotations><image name="a.jpg"><box label="dog" ...> (1.1)',
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_document,
    write_files=write_files,
)
