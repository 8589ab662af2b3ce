"""Pascal VOC: a folder of XML files, one per image, with a `bndbox` per object.

<annotation><folder>VOC2012</folder><filename>a.jpg</filename>
 <size><width>500</width><height>375</height></size>
 <object><name>dog</name><difficult>0</difficult>
  <bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax></bndbox></object>
</annotation>

The VOC development kit counts pixels from 1, inclusive, so a box starts at xmin - 1 and ends at
xmax. Use --box-format xyxy for tools that count from 0. `difficult`, `truncated` and `occluded` are
stored in the metadata.

The image is searched next to the XML file, and in `JPEGImages`, `images` and the `folder` of the
annotation, next to the folder of the XML file. XML with a DOCTYPE is rejected, because it could
declare entities.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from finesight.bounded_files import find_existing
from finesight.data.boxes import BOX_DECIMALS, BoxConvention, parse_coordinates
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
    enclose_shape,
    group_boxes_by_image,
    list_image_names,
    make_unique_stem,
    parse_integer,
    round_coordinate,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.image_header import CorruptImageError, ImageSize
from finesight.data.row_reader import RowReader, SourceRow, open_annotation_files
from finesight.data.sample import MAX_LABEL_FILE_BYTES, LocatedSample, read_data_file
from finesight.errors import UserError

BNDBOX_TAGS = ("xmin", "ymin", "xmax", "ymax")
OBJECT_FLAGS = ("difficult", "truncated", "occluded")
IMAGE_FOLDERS = ("JPEGImages", "images")
_ROOT_TAGS = ("filename", "path", "folder", "size", "segmented", "object")
_OBJECT_TAGS = ("name", "bndbox", "part", *OBJECT_FLAGS)
NOTE_PARTS = "parts of objects (ignored)"


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


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open the Pascal VOC files of a folder, or a single one, as rows.

    Returns:
        The rows and the reason for the match, or None if the first files are not annotations.
    """
    description = "XML files with <annotation>: Pascal VOC"
    return open_annotation_files(source, ".xml", description, b"<annotation", _read_classes)


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a Pascal VOC file."""
    file = Path(row.record["file"])
    root = _read_xml(file)
    if root.tag != "annotation":
        raise UserError(
            f"an XML file of <{root.tag}>",
            expected="<annotation>",
            remedy="remove the file from the folder",
        )
    is_one_based = (
        context.resolve_convention(BoxConvention()) == BoxConvention()
        and context.box_format is None
    )
    source_notes: Counter[str] = Counter()
    objects = []
    for element in root.iterfind("object"):
        source_notes[NOTE_PARTS] += len(element.findall("part"))
        if element.find("bndbox") is None:
            bounds = enclose_shape("objects without a bndbox", None, source_notes)
            objects.append(ObjectAnnotation(element.findtext("name", "").strip(), bounds))
        else:
            objects.append(_parse_object(element, one_based=is_one_based))
    elements = [(root, _ROOT_TAGS), *((one, _OBJECT_TAGS) for one in root.iterfind("object"))]
    for element, used in elements:
        children = [{child.tag: child.text} for child in element]
        count_keys(children, used, element.tag, context.other_keys)
    image = _find_image(file, root, required=not context.lenient)
    annotation = ImageAnnotation(
        str(image), objects, row.record["classes"], _read_size(root), source_notes=source_notes
    )
    return build_detection_examples(row, annotation, context, BoxConvention())


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write a Pascal VOC file per image to the folder Annotations."""
    used_stems: set[str] = set()
    for record in group_boxes_by_image(samples, context, {"boxes"}):
        stem = make_unique_stem(record.image_path.stem, used_stems)
        root = _build_element(record, context)
        ElementTree.indent(root)
        yield f"Annotations/{stem}.xml", ElementTree.tostring(root, "utf-8") + b"\n"


def _read_xml(file: Path) -> ElementTree.Element:
    return parse_xml(read_data_file(file, MAX_LABEL_FILE_BYTES), "an annotation of Pascal VOC")


def parse_xml(content: str | bytes, expected: str) -> ElementTree.Element:
    """Parse XML of an annotation tool without entities, in any declared encoding.

    Raises:
        UserError: The XML is invalid, or has a DOCTYPE, which could declare entities.
    """
    parser = ElementTree.XMLParser(target=_SafeTreeBuilder())
    try:
        declared = _XML_ENCODING.match(content) if isinstance(content, bytes) else None
        if declared is not None and isinstance(content, bytes):
            # The XML parser reads no multi-byte encodings; GB 18030 extends GB 2312 and GBK.
            name = declared[1].decode().lower()
            content = content.decode("gb18030" if name.startswith("gb") else name)
        parser.feed(content)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"broken XML: {error}",
            expected=expected,
            remedy="export the file again, or remove it from the folder",
        ) from error
    assert isinstance(root, ElementTree.Element), f"XML became {type(root)}"
    return root


def _read_classes(file: Path) -> tuple[bool, set[str]]:
    root = _read_xml(file)
    names = (element.findtext("name", "").strip() for element in root.iterfind("object"))
    return root.tag == "annotation", {name for name in names if name}


def _parse_object(element: ElementTree.Element, *, one_based: bool) -> ObjectAnnotation:
    label = element.findtext("name", "").strip()
    if not label:
        raise UserError(
            "an object without a name", expected="<name>", remedy="add a name, or remove it"
        )
    texts = [element.findtext(f"bndbox/{corner}", "").strip() for corner in BNDBOX_TAGS]
    coordinates = parse_coordinates(texts)
    if one_based:
        x1, y1, x2, y2 = coordinates
        coordinates = [round(x1 - 1, BOX_DECIMALS), round(y1 - 1, BOX_DECIMALS), x2, y2]
    flags = {flag: element.findtext(flag, "").strip() for flag in OBJECT_FLAGS}
    attributes = {flag: int(value) for flag, value in flags.items() if value in ("0", "1")}
    return ObjectAnnotation(label, coordinates, attributes)


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


def _read_size(root: ElementTree.Element) -> ImageSize | None:
    height, width = (
        parse_integer(root.findtext(f"size/{side}", "").strip()) for side in ("height", "width")
    )
    # Some tools write 0 for an unknown size.
    return (height, width) if height and width else None


def _build_element(record: ImageRecord, context: ExportContext) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    name = Path(context.image_name(record.image_path))
    add_child(root, "folder", name.parent.as_posix())
    add_child(root, "filename", name.name)
    height, width = context.image_size(record.image_path)
    size = ElementTree.SubElement(root, "size")
    add_child(size, "width", width)
    add_child(size, "height", height)
    add_child(size, "depth", 3)
    for box in record.boxes:
        element = ElementTree.SubElement(root, "object")
        add_child(element, "name", box.label)
        for flag in OBJECT_FLAGS:
            if flag in box.attributes:
                add_child(element, flag, box.attributes[flag])
        bounds = ElementTree.SubElement(element, "bndbox")
        x1, y1, x2, y2 = box.xyxy
        for corner, value in zip(BNDBOX_TAGS, (x1 + 1, y1 + 1, x2, y2), strict=True):
            add_child(bounds, corner, round_coordinate(value))
    return root


def add_child(parent: ElementTree.Element, tag: str, value: object) -> None:
    """Append an element with a text."""
    ElementTree.SubElement(parent, tag).text = str(value)


FORMAT = DatasetFormat(
    name="voc",
    description="a folder of XML files, <annotation><filename>..., <object><name>..., <bndbox>",
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_folder,
    write_files=write_files,
)
