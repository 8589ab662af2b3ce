"""A YOLO data set: pictures with a text file each, a line `class cx cy width height` for a box.

dataset/data.yaml (names, train, val), images/train/a.jpg, labels/train/a.txt, or all in one folder
with classes.txt. Numbers are shares of the picture's width and height, the class is its place in
the names. A picture's labels lie beside it or where `images` in its path is `labels`.

An empty label file says that nothing is there; a picture without one is left out and counted.
Lines with corners of an outline become the box around it, counted; with `kpt_shape` in data.yaml
the numbers after the box are keypoints, not read. Splits come in the order train, test, val, so
that --eval-last holds the last out, and stand in each sample's meta.
"""

from __future__ import annotations

import itertools
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from finesight.data.boxes import BadBox, BoxForm
from finesight.data.case import Case
from finesight.data.formats.box_sets import Marked, Pictured, questions
from finesight.data.formats.by_picture import (
    Gathered,
    boxes_by_picture,
    classes_of,
    inside,
    text_beside,
)
from finesight.data.formats.format import Format, Reading, Writing, listed, never
from finesight.data.formats.inventory import START, inventory
from finesight.data.jsonl import Located, read_bytes
from finesight.data.limits import LARGEST_DESCRIPTION, LARGEST_LABELS, MAX_BOXES, check_count
from finesight.data.lines import opened
from finesight.data.numbers import whole_number
from finesight.data.rows import Record, Row, Rows, rows_of
from finesight.errors import UserError
from finesight.file_names import existing
from finesight.yaml_text import parsed

CENTRE_AND_SIZE = BoxForm(format="cxcywh", units="1")
SPLITS = ("train", "test", "val")
LISTS_OF_NAMES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels")
UNLABELLED = "pictures without a label file"
OUTLINED = "outlines, read as the boxes around them"
KEYPOINTS = "keypoints, not read"
LOOKED_AT = 20

_UPWARDS = re.compile(r"^(?:\.\./)+")
_LINE = re.compile(r"\d+(?:\s+[-+.\deE]+){4,}\s*")


@dataclass(frozen=True, slots=True)
class _Set:
    """What a YOLO data set is made of: its class names and its pictures with their splits."""

    names: dict[int, str]
    pictures: tuple[tuple[str, Path], ...]
    has_keypoints: bool
    known_by: str


def open_folder(source: Path) -> tuple[Rows, str] | None:
    """A row for each picture of a folder with data.yaml, or with class names and label files.

    Raises UserError where the yaml file names no classes or no pictures that exist, and where label
    files come without names.
    """
    found = _by_yaml(source) or _by_names(source)
    if found is None:
        return None
    names = list(found.names.values())

    def row(number: int, one: tuple[str, Path]) -> Row:
        split, picture = one
        label = _label_file(picture)
        record = {
            "id": picture.stem,
            "image": str(picture),
            "labels": str(label),
            "names": found.names,
            "classes": names,
            "keypoints": found.has_keypoints,
            "meta": {"split": split} if split else {},
        }
        return Row(number, str(label), record, source.stem)

    counts = Counter(split for split, _ in found.pictures if split)
    parts = ", ".join(f"{split} {count}" for split, count in counts.items())
    reason = f"{found.known_by}: {len(names)} classes{', pictures: ' if parts else ''}{parts}"
    return rows_of(found.pictures, row), reason


def read(row: Row, reading: Reading) -> list[Case]:
    """See the head of this file for what is read."""
    record = row.record
    labels = Path(record["labels"])
    if not os.path.isfile(labels):
        reading.left_out[UNLABELLED] += 1
        return []
    noted: Counter[str] = Counter()
    text = read_bytes(labels, LARGEST_LABELS).decode("utf-8", "replace")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    check_count(len(lines), MAX_BOXES, "boxes")
    objects = [_marked(line, number, record, noted) for number, line in lines]
    pictured = Pictured(
        record["image"], objects, record["classes"], meta=record["meta"], noted=noted
    )
    return questions(row, pictured, reading, CENTRE_AND_SIZE)


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """data.yaml, a list of pictures for each split, and a label file beside each picture.

    Without a split in its meta a picture is of `train`. Raises UserError for pictures outside of
    the output folder: a label file is found by its picture's path alone.
    """
    pictures = boxes_by_picture(samples, writing, {"split"})
    classes = classes_of(pictures)
    lists: defaultdict[str, list[str]] = defaultdict(list)
    taken: set[str] = set()
    for one in pictures:
        name = inside(one.path, writing, "YOLO")
        split = one.meta.get("split")
        lists[split if split in SPLITS else "train"].append(f"./{name}\n")
        yield text_beside(name, taken), _lines(one, classes, writing).encode()
    for split, lines in lists.items():
        yield f"{split}.txt", "".join(lines).encode()
    if "val" not in lists:
        writing.notes.append(
            "no picture is of the split `val`, which Ultralytics asks for: name a list in data.yaml"
        )
    description = {
        **{split: f"{split}.txt" for split in SPLITS if split in lists},
        "names": dict(enumerate(classes)),
    }
    yield "data.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode()


def _by_yaml(source: Path) -> _Set | None:
    files = [source] if source.suffix.lower() in (".yaml", ".yml") and source.is_file() else []
    if source.is_dir():
        files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    for file in files:
        description = _description(file)
        if "names" in description:
            names = _names(description["names"], file)
            pictures = tuple(_split_pictures(description, file))
            if not pictures:
                raise UserError(
                    "no pictures are found",
                    where=str(file),
                    expected="pictures in the folders or lists of train, val and test",
                    remedy="correct these, from the folder of the file on",
                )
            return _Set(names, pictures, "kpt_shape" in description, f"names in {file.name}")
    return None


def _description(file: Path) -> Record:
    try:
        content = parsed(read_bytes(file, LARGEST_DESCRIPTION))
    except yaml.YAMLError:
        return {}  # some other program's file
    return content if isinstance(content, dict) else {}


def _names(value: object, file: Path) -> dict[int, str]:
    """A list of names, or names by their numbers."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(listed(value)))
    known = (isinstance(number, int) and isinstance(name, str | int) for number, name in pairs)
    if not pairs or not all(known):
        raise UserError(
            f"names is {reprlib.repr(value)[:60]}",  # aliases can make its text endless
            where=str(file),
            expected="a list of class names, or names by their numbers",
            remedy="name the classes",
        )
    return {number: str(name) for number, name in pairs}


def _split_pictures(description: Record, file: Path) -> Iterator[tuple[str, Path]]:
    """The pictures of each split, each picture once: of folders, and of lists of paths."""
    if not any(description.get(split) for split in SPLITS):
        yield from (("", picture) for picture in inventory(file.parent).pictures())
        return
    seen: set[Path] = set()
    for split in SPLITS:
        for entry in listed(description.get(split)):
            place = _place(str(entry), str(description.get("path") or ""), file, split)
            new = [picture for picture in _pictures_at(place) if picture not in seen]
            seen.update(new)
            yield from ((split, picture) for picture in new)


def _place(entry: str, root: str, file: Path, split: str) -> Path:
    """Where an entry of data.yaml is: from `path` or the file on; tools also write a `../` more
    than there is, and a `path` from a folder of their own on."""
    home = file.parent
    inner = _UPWARDS.sub("", entry)
    names = [os.path.join(root, entry), entry, os.path.join(Path(root).name, entry), inner]
    for name in names:
        found = existing(home, name)
        if found is not None:
            return found
    raise UserError(
        f"{split}: {entry} is not found",
        where=str(file),
        expected=f"one of {', '.join(dict.fromkeys(str(home / name) for name in names))}",
        remedy=f"correct `{split}` or `path`, from the folder of {file.name} on",
    )


def _pictures_at(place: Path) -> list[Path]:
    if os.path.isdir(place):
        return inventory(place).pictures()
    lines = [line.strip() for line in os.fsdecode(read_bytes(place)).split("\n")]
    listed_pictures = [
        existing(place.parent, line) or place.parent / line for line in lines if line
    ]
    unnamed = next((picture for picture in listed_pictures if not picture.name), None)
    if unnamed is not None:
        raise UserError(
            f"{unnamed} is listed as an image",
            where=str(place),
            expected="one path of an image on each line",
            remedy="correct the list",
        )
    return listed_pictures


def _by_names(source: Path) -> _Set | None:
    """A folder without data.yaml: names in a list, label files with numbers in their lines."""
    if not source.is_dir():
        return None
    pictures = inventory(source).pictures()
    labelled = (path for path in pictures if os.path.isfile(_label_file(path)))
    looked = [_label_file(path) for path in itertools.islice(labelled, LOOKED_AT)]
    lines = [line for file in looked for line in _first_lines(file)]
    said = [line for line in lines if line.strip()]
    # Single broken lines do not make a text of it: they are refused when it is their turn.
    if not said or 2 * sum(_LINE.fullmatch(line) is not None for line in said) <= len(said):
        return None
    for name in LISTS_OF_NAMES:
        if (source / name).is_file():
            texts = _list_of_names(source / name)
            names = dict(enumerate(text.strip() for text in texts if text.strip()))
            known_by = f"label files with numbers, {name}"
            return _Set(names, tuple(("", path) for path in pictures), False, known_by)
    raise UserError(
        f"label files with class numbers, such as {said[0]!r} in {looked[0].name}, but no names",
        where=str(source),
        expected=f"data.yaml with `names`, or one of {', '.join(LISTS_OF_NAMES)}",
        remedy="write the names of the classes into classes.txt, one a line, the first being 0",
    )


def _first_lines(file: Path) -> list[str]:
    """The whole lines at the start of a file."""
    with opened(file) as content:
        start = content.read(START)
    lines = start.decode("utf-8", "replace").splitlines()
    return lines[:-1] if len(start) == START and len(lines) > 1 else lines


def _list_of_names(file: Path) -> list[str]:
    try:
        return read_bytes(file, LARGEST_LABELS).decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(file),
            expected="the names of the classes in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def _label_file(picture: Path) -> Path:
    """Where `images` is `labels`, as Ultralytics has it, if a file is there; else beside it."""
    parts = list(picture.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
        mirrored = Path(*parts).with_suffix(".txt")
        if os.path.isfile(mirrored):
            return mirrored
    return picture.with_suffix(".txt")


def _marked(line: str, number: int, record: Record, noted: Counter[str]) -> Marked:
    name = Path(record["labels"]).name
    pieces = line.split()
    try:
        shares = [float(piece) for piece in pieces[1:]]
    except ValueError:
        shares = []
    outlined = len(shares) > 4 and len(shares) % 2 == 0
    is_known = len(shares) == 4 or outlined or (len(shares) > 4 and record["keypoints"])
    if not is_known or not pieces[0].isdecimal():
        raise BadBox(
            f"{name}:{number}: {line.strip()[:80]!r}",
            expected="a class number, then centre and size, or the corners of an outline",
            remedy="correct the line; a sixth number, a confidence, has no place in labels",
        )
    kind = whole_number(pieces[0])
    if kind not in record["names"]:
        raise UserError(
            f"{name}:{number}: class {pieces[0][:40]}",
            expected=f"one of the {len(record['names'])} names, the first being 0",
            remedy="add the name, or correct the line",
        )
    label = record["names"][kind]
    if record["keypoints"] and len(shares) > 4:
        noted[KEYPOINTS] += 1
        return Marked(label, shares[:4])
    if len(shares) == 4:
        return Marked(label, shares)
    noted[OUTLINED] += 1
    x1, y1 = min(shares[::2]), min(shares[1::2])
    x2, y2 = max(shares[::2]), max(shares[1::2])
    return Marked(label, [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def _lines(one: Gathered, classes: Sequence[str], writing: Writing) -> str:
    height, width = writing.size(one.path)
    lines = []
    for box in one.boxes:
        x1, y1, x2, y2 = box.xyxy
        centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        shares = (*centre, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{classes.index(box.label)} {' '.join(f'{s:.12g}' for s in shares)}\n")
    return "".join(lines)


FORMAT = Format(
    name="yolo",
    looks="a folder with data.yaml or classes.txt, pictures, and a .txt file of boxes for each",
    keys=frozenset(),
    detect=never,
    read=read,
    takes=frozenset({"prompt", "boxes", "ask"}),
    open=open_folder,
    write=write,
)
