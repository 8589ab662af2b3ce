"""CVAT for images: an XML file with the shapes and tags of all images.

Other shapes than boxes, polygons, polylines and masks have no box. Attributes and `occluded` are
stored in the metadata. In a file without shapes, the tags of an image are its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import find_existing
from finesight.ingest.folder_listing import list_folder
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
)
from finesight.ingest.formats.image_annotations import (
    NO_OUTLINES,
    ImageRecord,
    ObjectAnnotation,
    Outlines,
    build_detection_examples,
    build_text_example,
    collect_classes,
    decode_runs,
    enclose_shape,
    find_image_folder,
    group_by_image,
    require_inside_output,
    round_coordinate,
    trace_mask,
)
from finesight.ingest.formats.row_keys import count_keys
from finesight.ingest.formats.xml_annotations import parse_xml
from finesight.ingest.image_resolver import IMAGES_FOLDER
from finesight.ingest.row_reader import SNIFF_BYTES, RowReader, SourceRow, rows_from_items
from finesight.samples.boxes import find_bounds, rotate_rectangle, translate_shape_errors
from finesight.samples.frames import PIXELS
from finesight.samples.sample import LocatedSample, read_data_file

CORNERS = ("xtl", "ytl", "xbr", "ybr")
_IMAGE_KEYS = ("id", "name", "width", "height")
_SHAPE_KEYS = ("left", "top", "width", "height", "rle", "outside")
REASON_NO_TAG = "images without a tag"
MAX_NAME_CHARS = 64
"""Maximum number of characters of a label name in CVAT."""

_CVAT_DOCUMENT = "CVAT for images 1.1: <annotations> with <image> elements"


def _add_children(parent: ElementTree.Element, **texts: object) -> None:
    """Append an element with a text for each tag."""
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _open_cvat(source: Path) -> tuple[RowReader, str] | None:
    """Open a CVAT file, or the only XML file of a folder, as rows, one per image."""
    files = list_folder(source).files_with_suffix(".xml") if source.is_dir() else [source]
    if len(files) != 1 or files[0].suffix.lower() != ".xml" or not files[0].is_file():
        return None
    content = read_data_file(files[0])
    if b"<annotations" not in content[:SNIFF_BYTES]:
        return None
    root = parse_xml(content, _CVAT_DOCUMENT)
    images = root.findall("image")
    if not images:
        problem = "tracks of a video" if root.find("track") is not None else "no image"
        raise UserError(
            f"the file contains {problem}",
            where=str(files[0]),
            expected=_CVAT_DOCUMENT,
            remedy="export the task as `CVAT for images 1.1`",
        )
    folder = find_image_folder(files[0], [image.get("name", "") for image in images])
    shapes = [shape for image in images for shape in image if shape.tag not in ("tag", "points")]
    labeled = shapes or [tag for image in images for tag in image.iterfind("tag")]
    declared = [label.text or "" for label in root.iterfind("meta/*/labels/label/name")]
    used = {shape.get("label", "") for shape in labeled}
    classes = [*dict.fromkeys([*filter(None, declared), *sorted(used - {""})])]
    points = sorted({name for image in images for one in image for name, _ in _list_points(one)})

    def make_row(row_number: int, image: ElementTree.Element) -> SourceRow:
        name = image.get("name", "").replace("\\", "/")
        record = {
            "id": PurePosixPath(name).stem,
            "path": str(find_existing(folder, name) or folder / name),
            "image": image,
            "classes": classes,
            "is_detection": bool(shapes),
            "points": points,
        }
        return SourceRow(row_number, f"image {image.get('id')} ({name})", record, source.stem)

    task = "shapes" if shapes else "tags"
    count = format_count(len(classes), "class")
    reason = f"<annotations> with <image>: CVAT {task} of {count}, images in {folder}"
    others = (one.tag for one in root if one.tag not in ("version", "meta", "image"))
    other_keys = Counter(f"{tag} of files, not imported" for tag in others)
    return replace(rows_from_items(images, make_row), other_keys=other_keys), reason


def _parse_cvat(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a CVAT file."""
    image, classes = row.record["image"], row.record["classes"]
    count_keys([image.attrib], _IMAGE_KEYS, "images", context.other_keys)
    if not row.record["is_detection"] and context.box_task != "points":
        count_keys((one.attrib for one in image), ("label", "source"), "tags", context.other_keys)
        context.row_notes["attributes of tags (ignored)"] += len(image.findall("tag/attribute"))
        context.row_notes["points next to tags (ignored)"] += len(image.findall("points"))
        tags = [tag.get("label", "") for tag in image.iterfind("tag")]
        if not any(tags):
            context.skipped_rows[REASON_NO_TAG] += 1
            return []
        answer, meta = ", ".join(filter(None, tags)), {"classes": classes}
        return [build_text_example(row.id, row.record["path"], [answer], classes, context, meta)]
    shown = [shape for shape in image if shape.get("outside") != "1"]
    context.row_notes["shapes that are outside (skipped)"] += len(image) - len(shown)
    inner = [*image.iterfind("*/points/attribute"), *image.iterfind("*/points[@occluded='1']")]
    context.row_notes["attributes of points in skeletons (ignored)"] += len(inner)
    objects = [_parse_shape(shape, context) for shape in shown]
    used = (*CORNERS, "label", "occluded", "rotation", "points", "source", "z_order", *_SHAPE_KEYS)
    count_keys((shape.attrib for shape in image), used, "shapes", context.other_keys)
    size = image.get("height"), image.get("width")
    path = row.record["path"]
    return build_detection_examples(row, context, PIXELS, path, objects, declared_size=size)


def _write_cvat(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write the file annotations.xml, with boxes, or with tags if no answer contains a box."""
    records, _ = group_by_image(samples, context, {"boxes"})
    answers = dict.fromkeys(answer for record in records for answer in record.answers)
    classes = list(dict.fromkeys([*collect_classes(records), *answers]))
    root = ElementTree.Element("annotations")
    _add_children(root, version="1.1")
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    _add_children(task, name="finesight", size=len(records))
    labels = ElementTree.SubElement(task, "labels")
    for name in classes:
        if len(name) > MAX_NAME_CHARS:
            raise UserError(
                f"the label {name[:60]!r}... has {len(name)} characters",
                where="--to cvat",
                expected=f"boxes with labels or classes of at most {MAX_NAME_CHARS} characters",
                remedy="export texts to label-studio or coco",
            )
        label = ElementTree.SubElement(labels, "label")
        _add_children(label, name=name)
        attributes = ElementTree.SubElement(label, "attributes")
        boxes = [box for record in records for box in record.boxes if box.label == name]
        for attribute_name in sorted({key for box in boxes for key in box.attributes}):
            if attribute_name != "occluded":
                attribute = ElementTree.SubElement(attributes, "attribute")
                _add_children(attribute, name=attribute_name, mutable="False", input_type="text")
    for index, record in enumerate(records):
        root.append(_build_image(index, record, context))
    ElementTree.indent(root)
    yield "annotations.xml", bytes(ElementTree.tostring(root, "utf-8")) + b"\n"


def _parse_shape(shape: ElementTree.Element, context: ImportContext) -> ObjectAnnotation:
    label = shape.get("label", "").strip()
    with translate_shape_errors(shape.attrib, kind=shape.tag):
        bounds, outlines = _parse_geometry(shape, context)
        if not label:
            raise ValueError("no label")
    attributes: dict[str, str | int] = {
        attribute.get("name", ""): attribute.text or "" for attribute in shape.iterfind("attribute")
    }
    if shape.get("occluded") == "1":
        attributes["occluded"] = 1
    return ObjectAnnotation(label, bounds, outlines, attributes, _list_points(shape))


def _list_points(shape: ElementTree.Element) -> list[tuple[str, list[str]]]:
    """Return the points of a shape or skeleton with their labels."""
    label = shape.get("label", "").strip()
    elements = [(label, shape)] if shape.tag == "points" else []
    elements += [(f"{label} {one.get('label', '')}", one) for one in shape.iterfind("points")]
    return [
        (name, pair.split(","))
        for name, element in elements
        if element.get("outside") != "1"
        for pair in element.get("points", "").split(";")
    ]


def _parse_geometry(
    shape: ElementTree.Element, context: ImportContext
) -> tuple[list[float] | None, Outlines]:
    """Return enclosing box and outlines of a shape. Raises ValueError for invalid numbers."""
    kind, bounds, outlines = f"shapes of type {shape.tag}", None, NO_OUTLINES
    if shape.tag in ("polygon", "polyline"):
        pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
        bounds = find_bounds(pairs, shape.attrib)
        if shape.tag == "polygon":
            kind, outlines = "polygons", Outlines([pairs])
    elif shape.tag == "mask":
        x, y, width, height = (float(shape.get(name, "")) for name in _SHAPE_KEYS[:4])
        bounds = [x, y, x + width, y + height]
        if shape.get("rle") and context.box_task == "polygons":
            counts = [int(count) for count in shape.get("rle", "").split(",")]
            outlines = trace_mask(decode_runs(counts, (int(height), int(width)), "C"), x, y)
    elif shape.tag == "box":
        x1, y1, x2, y2 = (float(shape.get(corner, "")) for corner in CORNERS)
        angle, center = float(shape.get("rotation", "0")), ((x1 + x2) / 2, (y1 + y2) / 2)
        if not angle:
            return [x1, y1, x2, y2], outlines
        kind = "rotated rectangles"
        corners = rotate_rectangle((x1, y1, x2, y2), angle, center)
        bounds, outlines = find_bounds(corners, shape.attrib), Outlines([corners])
    return enclose_shape(kind, bounds, context, outlines), outlines


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
        options |= dict(zip(CORNERS, corners, strict=True))
        element = ElementTree.SubElement(image, "box", options)
        for name, value in box.attributes.items():
            if name != "occluded":
                ElementTree.SubElement(element, "attribute", name=name).text = str(value)
    for answer in record.answers:
        ElementTree.SubElement(image, "tag", label=answer, source="manual")
    return image


COMPONENT = DatasetFormat(
    name="cvat",
    description='an .xml file of <annotations><image name="a.jpg"><box label="dog" ...> (1.1)',
    parse_row=_parse_cvat,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_cvat,
    write_files=_write_cvat,
    position=50,
)
