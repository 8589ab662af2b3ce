"""Pascal VOC: a folder of XML files, one for a picture, with a `bndbox` for each object.

<annotation><folder>VOC2012</folder><filename>a.jpg</filename>
 <size><width>500</width><height>375</height></size>
 <object><name>dog</name><difficult>0</difficult>
  <bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax></bndbox></object>
</annotation>

The development kit counts pixels from 1 and the last one belongs to the box, so a box starts at
xmin - 1 and ends at xmax. Tools that count from 0 are read rightly with --box-format xyxy.
`difficult`, `truncated` and `occluded` are kept in meta. The picture lies beside the XML file or
in `JPEGImages`, `images` or its `folder` beside the XML file's folder. No entities, no DOCTYPE.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from finesight.data.boxes import DECIMALS, BoxForm, four_numbers
from finesight.data.case import Case
from finesight.data.formats.box_sets import Marked, Pictured, Size, questions
from finesight.data.formats.by_picture import Gathered, boxes_by_picture, distinct, shortest
from finesight.data.formats.format import Format, Reading, Writing, never
from finesight.data.formats.inventory import inventory, open_described
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located, read_bytes
from finesight.data.limits import LARGEST_LABELS
from finesight.data.numbers import whole_number
from finesight.data.rows import Row, Rows
from finesight.errors import UserError
from finesight.file_names import existing

CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = ("difficult", "truncated", "occluded")
FOLDERS = ("JPEGImages", "images")
UNBOXED = "objects without a bndbox, left out"
PARTS = "parts of objects, not read"


class _Guarded(ElementTree.TreeBuilder):
    """A tree builder that ends at a DOCTYPE, the only place where entities can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Called at its start. Raises UserError."""
        raise UserError(
            f"a DOCTYPE, {name[:60]!r}",
            expected="plain XML, as the development kit and labelling tools write it",
            remedy="take the DOCTYPE out",
        )


def open_folder(source: Path) -> tuple[Rows, str] | None:
    """A row for each XML file of a folder, or of one XML file."""
    files = [source] if source.suffix.lower() == ".xml" and source.is_file() else []
    if source.is_dir():
        files = inventory(source).ending(".xml")
    kind = "XML files with <annotation>: Pascal VOC"
    return open_described(files, source.stem, kind, _is_annotation, _classes_in)


def read(row: Row, reading: Reading) -> list[Case]:
    """See the head of this file for what is read."""
    file = Path(row.record["file"])
    root = _parsed(file)
    if root.tag != "annotation":
        raise UserError(
            f"an XML file of <{root.tag}>",
            expected="<annotation>",
            remedy="take the file out of the folder",
        )
    usual = reading.form(BoxForm()) == BoxForm() and reading.box_format is None
    noted: Counter[str] = Counter()
    objects = []
    for one in root.iterfind("object"):
        noted[PARTS] += len(one.findall("part"))
        if one.find("bndbox") is None:
            noted[UNBOXED] += 1
        else:
            objects.append(_marked(one, counts_from_1=usual))
    picture = _picture(file, root, required=not reading.lenient)
    pictured = Pictured(str(picture), objects, row.record["classes"], _size(root), noted=noted)
    return questions(row, pictured, reading, BoxForm())


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """Annotations/*.xml, one for each picture."""
    taken: set[str] = set()
    for one in boxes_by_picture(samples, writing, {"boxes"}):
        stem = distinct(one.path.stem, taken)
        root = _element(one, writing)
        ElementTree.indent(root)
        yield f"Annotations/{stem}.xml", ElementTree.tostring(root, "utf-8") + b"\n"


def _parsed(file: Path) -> ElementTree.Element:
    content = read_bytes(file, LARGEST_LABELS)
    parser = ElementTree.XMLParser(target=_Guarded())
    try:
        parser.feed(content)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"broken XML: {error}",
            expected="an annotation of Pascal VOC",
            remedy="export the file again, or take it out of the folder",
        ) from error
    assert isinstance(root, ElementTree.Element), f"XML became {type(root)}"
    return root


def _is_annotation(file: Path) -> bool:
    try:
        return _parsed(file).tag == "annotation"
    except UserError:  # told, with its file, when it is its turn
        return b"<annotation" in read_bytes(file, LARGEST_LABELS)


def _classes_in(file: Path) -> set[str]:
    """The names of a file's objects; a file that cannot be read is refused when it is its turn."""
    try:
        root = _parsed(file)
    except UserError:
        return set()
    names = (one.findtext("name", "").strip() for one in root.iterfind("object"))
    return {name for name in names if name}


def _marked(one: ElementTree.Element, *, counts_from_1: bool) -> Marked:
    label = one.findtext("name", "").strip()
    if not label:
        raise UserError(
            "an object without a name", expected="<name>", remedy="name it, or take it out"
        )
    texts = [one.findtext(f"bndbox/{corner}", "").strip() for corner in CORNERS]
    numbers = four_numbers(texts)
    if counts_from_1:
        x1, y1, x2, y2 = numbers
        numbers = [round(x1 - 1, DECIMALS), round(y1 - 1, DECIMALS), x2, y2]
    flags = {flag: one.findtext(flag, "").strip() for flag in FLAGS}
    notes = {flag: int(value) for flag, value in flags.items() if value in ("0", "1")}
    return Marked(label, numbers, notes)


def _picture(file: Path, root: ElementTree.Element, *, required: bool) -> Path:
    """The first place where a picture is; where it is in none, the first of all.

    Raises DamagedPicture, naming all places, for a missing one that is `required`.
    """
    name = root.findtext("filename", "").strip().replace("\\", "/") or file.with_suffix(".jpg").name
    folder = root.findtext("folder", "").strip()
    homes = [file.parent, *(file.parent.parent / inner for inner in (*FOLDERS, folder))]
    places = (existing(home, name) for home in homes)
    found = next((place for place in places if place and os.path.isfile(place)), None)
    if found is not None or not required:
        return found or homes[0] / name
    raise DamagedPicture(
        f"no picture {name!r}",
        expected=f"it in one of {', '.join(dict.fromkeys(map(str, homes)))}",
        remedy="put it there, or correct <filename>",
    )


def _size(root: ElementTree.Element) -> Size | None:
    height, width = (
        whole_number(root.findtext(f"size/{side}", "").strip()) for side in ("height", "width")
    )
    # Some tools write 0 for what they do not know.
    return (height, width) if height and width else None


def _element(one: Gathered, writing: Writing) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    name = Path(writing.name(one.path))
    _add(root, "folder", name.parent.as_posix())
    _add(root, "filename", name.name)
    height, width = writing.size(one.path)
    size = ElementTree.SubElement(root, "size")
    _add(size, "width", width)
    _add(size, "height", height)
    _add(size, "depth", 3)
    for box in one.boxes:
        element = ElementTree.SubElement(root, "object")
        _add(element, "name", box.label)
        for flag in FLAGS:
            if flag in box.notes:
                _add(element, flag, box.notes[flag])
        bounds = ElementTree.SubElement(element, "bndbox")
        x1, y1, x2, y2 = box.xyxy
        for corner, value in zip(CORNERS, (x1 + 1, y1 + 1, x2, y2), strict=True):
            _add(bounds, corner, shortest(value))
    return root


def _add(parent: ElementTree.Element, tag: str, value: object) -> None:
    ElementTree.SubElement(parent, tag).text = str(value)


FORMAT = Format(
    name="voc",
    looks="a folder of XML files, <annotation><filename>..., <object><name>..., <bndbox>",
    keys=frozenset(),
    detect=never,
    read=read,
    takes=frozenset({"prompt", "boxes", "ask"}),
    open=open_folder,
    write=write,
)
