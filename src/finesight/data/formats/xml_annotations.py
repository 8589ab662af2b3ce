"""Annotation files in XML: Pascal VOC and CVAT for images.

XML with a DOCTYPE is rejected, because it could declare entities.

voc: a folder of XML files, one per image, with a `bndbox` per object.

The VOC development kit counts pixels from 1, inclusive, so a box starts at xmin - 1 and ends at
xmax. Use --box-format xyxy for tools that count from 0.

cvat: an XML file with the shapes and tags of all images.

Other shapes than boxes, polygons, polylines and masks have no box. Attributes and `occluded` are
stored in the metadata. In a file without shapes, the tags of an image are its class.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from finesight.bounded_files import find_existing
from finesight.data.boxes import (
    BOX_DECIMALS,
    BoxConvention,
    find_bounds,
    parse_coordinates,
    rotate_rectangle,
    translate_shape_errors,
)
from finesight.data.folder_listing import list_folder, open_annotation_files
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
)
from finesight.data.formats.image_annotations import (
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
    list_image_names,
    require_inside_output,
    round_coordinate,
    trace_mask,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.image_file import CorruptImageError
from finesight.data.image_resolver import IMAGES_FOLDER
from finesight.data.row_reader import SNIFF_BYTES, RowReader, SourceRow, rows_from_items
from finesight.data.sample import (
    MAX_LABEL_FILE_BYTES,
    LocatedSample,
    read_data_file,
    translate_errors,
)
from finesight.errors import UserError, format_count

BNDBOX_TAGS = ("xmin", "ymin", "xmax", "ymax")
OBJECT_FLAGS = ("difficult", "truncated", "occluded")
IMAGE_FOLDERS = ("JPEGImages", "images")
_ROOT_TAGS = ("filename", "path", "folder", "size", "segmented", "object")
_OBJECT_TAGS = ("name", "bndbox", "part", *OBJECT_FLAGS)
NOTE_PARTS = "parts of objects (ignored)"
CORNERS = ("xtl", "ytl", "xbr", "ybr")
_IMAGE_KEYS = ("id", "name", "width", "height")
_SHAPE_KEYS = ("left", "top", "width", "height", "rle", "outside")
REASON_NO_TAG = "images without a tag"
MAX_NAME_CHARS = 64
"""Maximum number of characters of a label name in CVAT."""

_CVAT_DOCUMENT = "CVAT for images 1.1: <annotations> with <image> elements"

_XML_ENCODING = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)")


class _SafeTreeBuilder(ElementTree.TreeBuilder):
    """XML tree builder that rejects a DOCTYPE, without which no entities can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Raise UserError; the parser calls this method for a DOCTYPE."""
        raise UserError(
            f"a DOCTYPE, {name[:60]!r}",
            expected="XML without DOCTYPE, as written by the development kit and labeling tools",
            remedy="remove the DOCTYPE",
        )


def _open_voc(source: Path) -> tuple[RowReader, str] | None:
    """Open the Pascal VOC files of a folder, or a single one, as rows."""
    description = "XML files with <annotation>: Pascal VOC"
    return open_annotation_files(source, ".xml", description, b"<annotation", _read_classes)


def _parse_voc(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a Pascal VOC file."""
    file = Path(row.record["file"])
    root = _read_xml(file)
    if root.tag != "annotation":
        raise UserError(
            f"an XML file of <{root.tag}>",
            expected="<annotation>",
            remedy="remove the file from the folder",
        )
    is_default = context.resolve_convention(BoxConvention()) == BoxConvention()
    is_one_based = is_default and context.box_format is None
    notes = context.row_notes
    objects = []
    for element in root.iterfind("object"):
        notes[NOTE_PARTS] += len(element.findall("part"))
        if element.find("bndbox") is None:
            bounds = enclose_shape("objects without a bndbox", None, context)
            objects.append(ObjectAnnotation(element.findtext("name", "").strip(), bounds))
        else:
            objects.append(_parse_object(element, one_based=is_one_based))
    elements = [(root, _ROOT_TAGS), *((one, _OBJECT_TAGS) for one in root.iterfind("object"))]
    for element, used in elements:
        texts = ((child, (child.text or "").strip()) for child in element)
        children = [{child.tag: text or [one.tag for one in child]} for child, text in texts]
        count_keys([*children, element.attrib], used, element.tag, context.other_keys)
    image = _find_image(file, root, required=not context.lenient)
    size = root.findtext("size/height"), root.findtext("size/width")
    return build_detection_examples(
        row, context, BoxConvention(), str(image), objects, declared_size=size
    )


def _read_xml(file: Path) -> ElementTree.Element:
    return parse_xml(read_data_file(file, MAX_LABEL_FILE_BYTES), "an annotation of Pascal VOC")


def parse_xml(content: str | bytes, expected: str) -> ElementTree.Element:
    """Parse XML of an annotation tool without entities, in any declared encoding.

    Raises:
        UserError: The XML is invalid, or has a DOCTYPE, which could declare entities.
    """
    parser = ElementTree.XMLParser(target=_SafeTreeBuilder())
    remedy = "export the file again, or remove it from the folder"
    kinds = (ElementTree.ParseError, ValueError, LookupError)
    with translate_errors("broken XML", expected, remedy, kinds=kinds):
        declared = _XML_ENCODING.match(content) if isinstance(content, bytes) else None
        if declared is not None and isinstance(content, bytes):
            # The XML parser reads no multi-byte encodings; GB 18030 extends GB 2312 and GBK.
            name = declared[1].decode().lower()
            content = content.decode("gb18030" if name.startswith("gb") else name)
        parser.feed(content)
        root = parser.close()
    assert isinstance(root, ElementTree.Element), f"XML became {type(root)}"
    return root


def _read_classes(file: Path) -> tuple[bool, set[str], set[str]]:
    root = _read_xml(file)
    names = (element.findtext("name", "").strip() for element in root.iterfind("object"))
    return root.tag == "annotation", {name for name in names if name}, set()


def _parse_object(element: ElementTree.Element, *, one_based: bool) -> ObjectAnnotation:
    label = element.findtext("name", "").strip()
    if not label or any(len(element.findall(tag)) > 1 for tag in ("name", "bndbox")):
        what = f"an object with several names or boxes, {label!r}"
        what = what if label else "an object without a name"
        raise UserError(what, expected="one <name> and <bndbox>", remedy="correct or remove it")
    texts = [element.findtext(f"bndbox/{corner}", "").strip() for corner in BNDBOX_TAGS]
    coordinates = parse_coordinates(texts)
    if one_based:
        x1, y1, x2, y2 = coordinates
        coordinates = [round(x1 - 1, BOX_DECIMALS), round(y1 - 1, BOX_DECIMALS), x2, y2]
    flags = {flag: element.findtext(flag, "").strip() for flag in OBJECT_FLAGS}
    attributes = {k: int(v) if v in ("0", "1") else v for k, v in flags.items() if v}
    return ObjectAnnotation(label, coordinates, attributes=attributes)


def _find_image(file: Path, root: ElementTree.Element, *, required: bool) -> Path:
    """Return the image of an annotation: the first candidate path that exists.

    If none exists and the image is not required, the path next to the XML file is returned.
    """
    name = root.findtext("filename", "").strip().replace("\\", "/")
    names = [name] if name else list_image_names(file)
    folder = root.findtext("folder", "").strip()
    folders = [file.parent, *(file.parent.parent / inner for inner in (*IMAGE_FOLDERS, folder))]
    candidates = (find_existing(candidate, one) for candidate in folders for one in names)
    match = next((path for path in candidates if path and os.path.isfile(path)), None)
    if match is not None or not required:
        return match or folders[0] / names[0]
    raise CorruptImageError(
        f"no image {names[0]!r}",
        expected=f"the image in one of {', '.join(dict.fromkeys(map(str, folders)))}",
        remedy="move it there, or correct <filename>",
    )


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
    return build_detection_examples(
        row, context, BoxConvention(), path, objects, declared_size=size
    )


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


VOC = DatasetFormat(
    name="voc",
    description="a folder of XML files, <annotation><filename>..., <object><name>..., <bndbox>",
    parse_row=_parse_voc,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_voc,
)
CVAT = DatasetFormat(
    name="cvat",
    description='an .xml file of <annotations><image name="a.jpg"><box label="dog" ...> (1.1)',
    parse_row=_parse_cvat,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_cvat,
    write_files=_write_cvat,
)
