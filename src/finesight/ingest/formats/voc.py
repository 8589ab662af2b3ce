"""Pascal VOC: a folder of XML files, one per image, with a `bndbox` per object.

The VOC development kit counts pixels from 1, inclusive, so a box starts at xmin - 1 and ends at
xmax. Use --box-format xyxy for tools that count from 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from finesight.errors import UserError
from finesight.files.bounded_files import find_existing
from finesight.ingest.folder_listing import open_annotation_files
from finesight.ingest.formats.dataset_format import DatasetFormat, ImportContext, ImportExample
from finesight.ingest.formats.image_annotations import (
    ObjectAnnotation,
    build_detection_examples,
    enclose_shape,
    list_image_names,
)
from finesight.ingest.formats.row_keys import count_keys, reject_texts
from finesight.ingest.formats.xml_annotations import parse_xml
from finesight.ingest.row_reader import RowReader, SourceRow
from finesight.samples.boxes import parse_coordinates
from finesight.samples.frames import BOX_DECIMALS, PIXELS
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import MAX_LABEL_FILE_BYTES, read_data_file

BNDBOX_TAGS = ("xmin", "ymin", "xmax", "ymax")
OBJECT_FLAGS = ("difficult", "truncated", "occluded")
IMAGE_FOLDERS = ("JPEGImages", "images")
_ROOT_TAGS = ("filename", "path", "folder", "size", "segmented", "object")
_OBJECT_TAGS = ("name", "bndbox", "part", *OBJECT_FLAGS)
NOTE_PARTS = "parts of objects (ignored)"
TEXTS_REMEDY = (
    "if the texts belong neither to the question nor to the answer, import with --format voc; else"
    " write a table with a row per box (--map box=xmin,ymin,xmax,ymax and --map question=COLUMN or"
    " --map label=COLUMN)"
)


def _open_voc(source: Path) -> tuple[RowReader, str] | None:
    """Open the Pascal VOC files of a folder, or a single one, as rows."""
    description = "XML files with <annotation>: Pascal VOC"
    return open_annotation_files(source, ".xml", description, b"<annotation", _read_classes)


def _check_texts(row: SourceRow) -> None:
    """Reject texts of an image and of its objects, which would be left out."""
    root = _read_xml(Path(row.record["file"]))
    for child in root:
        reject_texts([{child.tag: child.text}], _ROOT_TAGS, "images", TEXTS_REMEDY)
    for element in root.iterfind("object"):
        for child in element:
            reject_texts([{child.tag: child.text}], _OBJECT_TAGS, "objects", TEXTS_REMEDY)


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
    _reject_unread_objects(root)
    is_default = context.resolve_frame(PIXELS) == PIXELS
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
    return build_detection_examples(row, context, PIXELS, str(image), objects, declared_size=size)


def _reject_unread_objects(root: ElementTree.Element) -> None:
    """Reject objects of other formats, which are not directly below the root.

    Metadata may be nested beside objects. In a file without objects, it may be objects of another
    name, and the image would count as one that shows none.
    """
    has_objects = root.find("object") is not None
    for element in root:
        is_nested = not has_objects and element.find("./*/*") is not None
        if element.tag not in _ROOT_TAGS and (is_nested or element.find(".//object") is not None):
            raise UserError(
                f"<{element.tag}> with further elements: perhaps the objects of another format",
                expected="<object> with <name> and <bndbox> directly in <annotation>",
                remedy="convert the files to Pascal VOC, or to a table with a row per box, such as"
                f" file,xmin,ymin,xmax,ymax,label; if <{element.tag}> has no objects, remove it",
            )


def _read_xml(file: Path) -> ElementTree.Element:
    return parse_xml(read_data_file(file, MAX_LABEL_FILE_BYTES), "an annotation of Pascal VOC")


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


COMPONENT = DatasetFormat(
    name="voc",
    description="a folder of XML files, <annotation><filename>..., <object><name>..., <bndbox>",
    parse_row=_parse_voc,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_voc,
    check_left_out=_check_texts,
    position=30,
)
