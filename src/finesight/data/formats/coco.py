"""COCO JSON, captions or instances: one document of images, annotations and categories.

{"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
 "annotations": [{"id": 7, "image_id": 1, "category_id": 2, "bbox": [x, y, width, height]}],
 "categories": [{"id": 2, "name": "dog"}]}

Boxes are the top left corner and size in pixels, counted from 0. Captions of one picture are
answers to one question. Crowd regions and annotations without a box are left out and counted;
segmentation, area and keypoints are not read. The pictures lie, all of them, in the folder of the
document or its parent, or in `images` or another folder of one of these: the first place that
holds them all, else the one that holds most. Of several folders the document's name decides.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats.box_sets import Marked, Pictured, Size, questions
from finesight.data.formats.by_picture import (
    TRIMMED,
    Gathered,
    boxes_by_picture,
    classes_of,
    shortest,
    speaks_of_boxes,
    texts_by_picture,
)
from finesight.data.formats.format import BadOption, Format, Reading, Scene, Writing, never, plain
from finesight.data.formats.inventory import is_json_object
from finesight.data.jsonl import Located, read_bytes
from finesight.data.limits import MAX_ANSWERS, MAX_BOXES, check_count
from finesight.data.rows import Record, Row, Rows, rows_of
from finesight.data.sample import Message, Part
from finesight.errors import UserError
from finesight.file_names import existing

CAPTION_PROMPT = "Describe the picture."
"""What is asked of a picture with captions unless --prompt says other."""

CORNER_AND_SIZE = BoxForm(format="xywh")
UNCAPTIONED = "pictures without a caption"
LOOKED_FOR = 500
"""About so many pictures are looked for to find their folder."""

NOT_READ = ("segmentation", "keypoints")


def open_document(source: Path) -> tuple[Rows, str] | None:
    """A row for each image of a .json file that holds images and annotations.

    Raises UserError when none of its pictures is found.
    """
    document = _document(source)
    if document is None:
        return None
    images, annotations = document["images"], document["annotations"]
    boxed = any("bbox" in one for one in annotations)
    if not images or not (boxed or any("caption" in one for one in annotations)):
        raise UserError(
            f"{len(images)} images, {len(annotations)} annotations, none with bbox or caption",
            where=str(source),
            expected="annotations with `bbox` (instances) or `caption`",
            remedy="give the document of the instances or of the captions",
        )
    ids = Counter(str(image.get("id")) for image in images)
    _refuse_twins(ids, source)
    folder = _folder_of_pictures(source, images)
    names = {
        str(one.get("id")): one["name"]
        for one in document["categories"]
        if isinstance(one.get("name"), str) and one["name"].strip()
    }
    by_image: defaultdict[str, list[Record]] = defaultdict(list)
    for annotation in annotations:
        by_image[str(annotation.get("image_id"))].append(annotation)

    def row(number: int, image: Record) -> Row:
        name = _file_name(image)
        record = {
            "id": Path(name).stem,
            "image": image,
            "path": str(existing(folder, name) or folder / name),
            "annotations": by_image.get(str(image.get("id")), []),
            "names": names if boxed else None,
        }
        return Row(number, f"image {image.get('id')} ({name})", record, source.stem)

    kind = f"instances of {len(names)} classes" if boxed else "captions"
    key = "bbox" if boxed else "caption"
    reason = f"images, annotations with {key}: COCO {kind}, pictures in {folder}"
    stray = sum(image_id not in ids for image_id in by_image)
    reason += f"; annotations of {stray} images that it does not list" if stray else ""
    return rows_of(images, row), reason


def read(row: Row, reading: Reading) -> list[Case]:
    """See the head of this file for what is read."""
    image, annotations = row.record["image"], row.record["annotations"]
    meta = {"image_id": image.get("id"), "license": image.get("license")}
    meta = {key: value for key, value in meta.items() if value is not None}
    if row.record["names"] is None:
        return _captions(row, annotations, meta, reading)
    names: dict[str, str] = row.record["names"]
    noted: Counter[str] = Counter()
    marked = [one for one in annotations if _is_object(one, noted)]
    check_count(len(marked), MAX_BOXES, "boxes")
    objects = [_marked(one, names) for one in marked]
    pictured = Pictured(
        row.record["path"], objects, list(names.values()), _size(image), meta, noted
    )
    return questions(row, pictured, reading, CORNER_AND_SIZE)


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """One document, of instances when any answer holds a box, else of captions."""
    boxed = speaks_of_boxes(samples)
    gathered = boxes_by_picture if boxed else texts_by_picture
    pictures = gathered(samples, writing, {"image_id", "license"})
    classes = classes_of(pictures)
    ids = _image_ids(pictures)
    annotations: list[Record] = []
    for image_id, one in zip(ids, pictures, strict=True):
        said = _boxes(one, classes) if boxed else [{"caption": text} for text in one.texts]
        writing.lost[TRIMMED] += sum(text != text.strip() for text in one.texts)
        start = len(annotations) + 1
        annotations += [
            {"id": number, "image_id": image_id, **record}
            for number, record in enumerate(said, start=start)
        ]
    document = {
        "images": [_image(i, one, writing) for i, one in zip(ids, pictures, strict=True)],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
    }
    if not boxed:
        del document["categories"]
    yield "annotations.json", (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def _document(source: Path) -> dict[str, list[Record]] | None:
    """The file's three lists if it is a COCO document; None for any other file."""
    content = read_bytes(source) if is_json_object(source) else b""
    if b'"annotations"' not in content:
        return None
    try:
        document = parse_json(content)
    except ValueError:
        return None  # lines of JSON, or broken: said by whoever reads rows
    lists = {key: document.get(key) or [] for key in ("images", "annotations", "categories")}
    if not all(isinstance(one, list) for one in lists.values()):
        return None
    return lists if all(isinstance(r, dict) for one in lists.values() for r in one) else None


def _refuse_twins(ids: Counter[str], source: Path) -> None:
    twin, uses = ids.most_common(1)[0]
    if uses > 1:
        raise UserError(
            f"{uses} images have the id {twin}",
            where=str(source),
            expected="an id of its own for each image, by which annotations name it",
            remedy="number the images anew, and their annotations with them",
        )


def _folder_of_pictures(source: Path, images: Sequence[Record]) -> Path:
    """Where the pictures are: the first kind of place that holds all of those that are looked for,
    else the place that holds most of them."""
    step = max(1, len(images) // LOOKED_FOR)
    names = [_file_name(image) for image in images[::step]]
    looked: list[Path] = []
    most, best = 0, list[Path]()
    for places in _places(source.parent.resolve() / source.name):
        looked += places
        found = {place: sum(existing(place, n) is not None for n in names) for place in places}
        if max(found.values(), default=0) > most:
            most = max(found.values())
            best = [place for place in places if found[place] == most]
        if most == len(names):
            break
    if not most:
        raise UserError(
            f"none of {len(names)} pictures is found, such as {names[0]!r}",
            where=str(source),
            expected=f"pictures in one of {', '.join(map(str, looked))}",
            remedy="put the pictures beside the document, in a folder `images`",
        )
    own = [place for place in best if place.name in source.stem]
    if len(best) > 1 and len(own) != 1:
        raise UserError(
            f"pictures of these names, such as {names[0]!r}, lie in {len(best)} folders",
            where=str(source),
            expected=f"one of {', '.join(map(str, best))}",
            remedy="put the folder into file_name, or the document into the folder",
        )
    return (own if len(best) > 1 else best)[0]


def _file_name(image: Record) -> str:
    """With slashes, also where tools on Windows wrote backslashes: a stem is told by these."""
    return str(image.get("file_name")).replace("\\", "/")


def _places(source: Path) -> Iterator[list[Path]]:
    """Places of one kind after the other: near ones first."""
    homes = (source.parent, source.parent.parent)
    yield from ([home] for home in homes)
    yield from ([home / "images"] for home in homes)
    for home in homes:
        yield [*_folders_in(home), *_folders_in(home / "images")]


def _folders_in(home: Path) -> list[Path]:
    try:
        return sorted(path for path in home.iterdir() if path.is_dir() and path.name != "images")
    except OSError:  # no such folder, or none that may be looked into
        return []


def _is_object(annotation: Record, noted: Counter[str]) -> bool:
    """Whether it is a single object with a box; what is not read is counted."""
    if annotation.get("iscrowd"):
        noted["crowd regions, left out"] += 1
        return False
    if "bbox" not in annotation:
        noted["annotations without a box, left out"] += 1
        return False
    noted.update(f"{key}, not read" for key in NOT_READ if annotation.get(key))
    return True


def _marked(annotation: Record, names: dict[str, str]) -> Marked:
    category = str(annotation.get("category_id"))
    if category not in names:
        raise UserError(
            f"annotation {annotation.get('id')} is of category {category}",
            expected=f"one of the {len(names)} categories of the document",
            remedy="add the category, or leave the annotation out",
        )
    return Marked(names[category], annotation["bbox"])


def _size(image: Record) -> Size | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _captions(
    row: Row, annotations: Sequence[Record], meta: Record, reading: Reading
) -> list[Case]:
    if reading.ask != "detection":
        raise BadOption(
            f"{reading.ask} of captions",
            where="--ask",
            expected="a document of instances, with boxes",
            remedy="leave --ask out, or give the document of the instances",
        )
    texts = [_caption(one) for one in annotations if "caption" in one]
    check_count(len(texts), MAX_ANSWERS, "captions")
    if not texts:
        reading.left_out[UNCAPTIONED] += 1
        return []
    prompt = CAPTION_PROMPT if reading.prompt is None else reading.prompt
    asked: list[Part] = [Scene(reading).picture(row.record["path"])]
    asked += [plain(prompt)] if prompt else []
    user = Message(role="user", content=tuple(asked))
    return [Case(row.id, (user,), tuple((plain(text),) for text in texts), meta=meta)]


def _caption(annotation: Record) -> str:
    text = annotation["caption"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"annotation {annotation.get('id')} has the caption {str(text)[:60]!r}",
            expected="a text",
            remedy="write one, or take the annotation out",
        )
    return text.strip()


def _image_ids(pictures: Sequence[Gathered]) -> list[int]:
    """The ids that an import noted, if all pictures have one of their own; else numbers."""
    noted = [one.meta.get("image_id") for one in pictures]
    ids = [value for value in noted if isinstance(value, int)]
    return ids if len(set(ids)) == len(noted) else list(range(1, len(noted) + 1))


def _image(image_id: int, one: Gathered, writing: Writing) -> Record:
    height, width = writing.size(one.path)
    record = {"id": image_id, "file_name": writing.name(one.path), "width": width, "height": height}
    return record if "license" not in one.meta else {**record, "license": one.meta["license"]}


def _boxes(one: Gathered, classes: Sequence[str]) -> Iterator[Record]:
    for box in one.boxes:
        x1, y1, x2, y2 = box.xyxy
        width, height = shortest(x2 - x1), shortest(y2 - y1)
        yield {
            "category_id": classes.index(box.label) + 1,
            "bbox": [shortest(x1), shortest(y1), width, height],
            "area": shortest(width * height),
            "iscrowd": 0,
        }


FORMAT = Format(
    name="coco",
    looks='a .json file of {"images": [...], "annotations": [...], "categories": [...]}',
    keys=frozenset({"annotations", "categories"}),
    detect=never,
    read=read,
    takes=frozenset({"prompt", "boxes", "ask"}),
    open=open_document,
    write=write,
)
