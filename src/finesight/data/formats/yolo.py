"""YOLO datasets: a label file per image with lines `class cx cy width height`.

A dataset consists of dataset/data.yaml (names, train, val), images/train/a.jpg and
labels/train/a.txt, or of a single folder with classes.txt. Coordinates are normalized to the image
size, and the class is an index of the list of names. Labels are next to the image, or in the path
with `images` replaced by `labels`.

An empty label file is an image without objects. If data.yaml has `kpt_shape`, the values after the
box are keypoints and ignored. Splits are ordered train, test, val, so that --eval-last uses the
last one for validation.
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

from finesight.bounded_files import find_existing, load_yaml
from finesight.data.boxes import BoxConvention, InvalidBoxError, find_bounds
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.data.formats.image_annotations import (
    ImageAnnotation,
    ImageRecord,
    ObjectAnnotation,
    assign_text_file,
    build_detection_examples,
    collect_classes,
    enclose_shape,
    group_by_image,
    parse_integer,
    require_inside_output,
)
from finesight.data.line_index import open_data_file
from finesight.data.row_reader import (
    SNIFF_BYTES,
    Record,
    RowReader,
    SourceRow,
    list_folder,
    rows_from_items,
)
from finesight.data.sample import (
    MAX_DESCRIPTION_BYTES,
    MAX_LABEL_FILE_BYTES,
    LocatedSample,
    read_data_file,
    read_text_file,
)
from finesight.errors import UserError, format_count

YOLO_BOX_CONVENTION = BoxConvention(format="cxcywh", units="1")
SPLITS = ("train", "test", "val")
CLASS_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels")
REASON_NO_LABEL_FILE = "images without a label file"
NOTE_KEYPOINTS = "keypoints (ignored)"
NUM_DETECTION_FILES = 20

_UPWARDS = re.compile(r"^(?:\.\./)+")
_LABEL_LINE = re.compile(r"\d+(?:\s+[-+.\deE]+){4,}\s*")


@dataclass(frozen=True, slots=True)
class _YoloDataset:
    """Class names and images of a YOLO dataset.

    Attributes:
        images: Split and path of each image; the split is "" in a dataset without splits.
        has_keypoints: Whether label lines contain keypoints after the box.
    """

    class_names: dict[int, str]
    images: tuple[tuple[str, Path], ...]
    has_keypoints: bool
    detected_by: str


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open a YOLO dataset as rows, one per image.

    The source is a folder with data.yaml or with class names and label files, or the YAML file."""
    dataset = _open_from_yaml(source) or _open_from_class_names(source)
    if dataset is None:
        return None
    names = list(dataset.class_names.values())

    def make_row(row_number: int, split_image: tuple[str, Path]) -> SourceRow:
        split, image = split_image
        label = _find_label_file(image)
        record = {
            "id": image.stem,
            "image": str(image),
            "labels": str(label),
            "names": dataset.class_names,
            "classes": names,
            "keypoints": dataset.has_keypoints,
            "meta": {"split": split} if split else {},
        }
        return SourceRow(row_number, str(label), record, source.stem)

    counts = Counter(split for split, _ in dataset.images if split)
    parts = ", ".join(f"{split} {count}" for split, count in counts.items())
    reason = f"{dataset.detected_by}: {format_count(len(names), 'class')}"
    reason += f", images: {parts}" if parts else ""
    return rows_from_items(dataset.images, make_row), reason


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a YOLO dataset."""
    record = row.record
    label_file = Path(record["labels"])
    if not os.path.isfile(label_file):
        context.skipped_rows[REASON_NO_LABEL_FILE] += 1
        return []
    text = read_data_file(label_file, MAX_LABEL_FILE_BYTES).decode("utf-8", "replace")
    objects = [
        _parse_label_line(line, line_number, record, context.row_notes)
        for line_number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    annotation = ImageAnnotation(record["image"], objects, record["classes"], meta=record["meta"])
    return build_detection_examples(row, annotation, context, YOLO_BOX_CONVENTION)


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write data.yaml, an image list per split, and a label file next to each image.

    Images without a split in their metadata are assigned to `train`.
    """
    records, _ = group_by_image(samples, context, {"split"}, is_detection=True)
    classes = collect_classes(records)
    images_by_split: defaultdict[str, list[str]] = defaultdict(list)
    used_names: set[str] = set()
    for record in records:
        name = require_inside_output(record.image_path, context, "YOLO")
        split = record.meta.get("split")
        images_by_split[split if split in SPLITS else "train"].append(f"./{name}\n")
        yield assign_text_file(name, used_names), _format_labels(record, classes, context).encode()
    for split, lines in images_by_split.items():
        yield f"{split}.txt", "".join(lines).encode()
    if "val" not in images_by_split:
        context.notes.append(
            "no image is in the split `val`, which Ultralytics requires: add a list to data.yaml"
        )
    description = {
        **{split: f"{split}.txt" for split in SPLITS if split in images_by_split},
        "names": dict(enumerate(classes)),
    }
    yield "data.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode()


def _open_from_yaml(source: Path) -> _YoloDataset | None:
    files = [source] if source.suffix.lower() in (".yaml", ".yml") and source.is_file() else []
    if source.is_dir():
        files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    for file in files:
        description = _read_yaml(file)
        if "names" in description:
            names = _parse_class_names(description["names"], file)
            images = tuple(_iter_split_images(description, file))
            if not images:
                raise UserError(
                    "no images are found",
                    where=str(file),
                    expected="images in the folders or lists of train, val and test",
                    remedy="correct these paths, relative to the folder of the file",
                )
            return _YoloDataset(names, images, "kpt_shape" in description, f"names in {file.name}")
    return None


def _read_yaml(file: Path) -> Record:
    try:
        content = load_yaml(read_data_file(file, MAX_DESCRIPTION_BYTES))
    except yaml.YAMLError:
        return {}  # YAML of another program
    return content if isinstance(content, dict) else {}


def _parse_class_names(value: object, file: Path) -> dict[int, str]:
    """Parse the list or mapping `names` of data.yaml to class names by ID."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(as_list(value)))
    are_valid = (
        isinstance(class_id, int) and isinstance(name, str | int) for class_id, name in pairs
    )
    if not pairs or not all(are_valid):
        raise UserError(
            f"names is {reprlib.repr(value)[:60]}",  # aliases can make repr endless
            where=str(file),
            expected="a list of class names, or names by class ID",
            remedy="add the class names",
        )
    return {class_id: str(name) for class_id, name in pairs}


def _iter_split_images(description: Record, file: Path) -> Iterator[tuple[str, Path]]:
    """Yield split and path of each image in the folders and image lists of data.yaml.

    Each image is yielded once. Without splits, all images below the folder of data.yaml are
    yielded.
    """
    if not any(description.get(split) for split in SPLITS):
        yield from (("", image) for image in list_folder(file.parent).image_files())
        return
    visited: set[Path] = set()
    for split in SPLITS:
        for entry in as_list(description.get(split)):
            path = _resolve_entry(str(entry), str(description.get("path") or ""), file, split)
            new_images = [image for image in _list_images(path) if image not in visited]
            visited.update(new_images)
            yield from ((split, image) for image in new_images)


def _resolve_entry(entry: str, root: str, file: Path, split: str) -> Path:
    """Resolve a path in data.yaml relative to its key `path` or to the YAML file.

    Variants are tried because some tools write an additional `../`, or a `path` that is relative to
    another folder.
    """
    base_folder = file.parent
    stripped = _UPWARDS.sub("", entry)
    names = [os.path.join(root, entry), entry, os.path.join(Path(root).name, entry), stripped]
    for name in names:
        found = find_existing(base_folder, name)
        if found is not None:
            return found
    raise UserError(
        f"{split}: {entry} is not found",
        where=str(file),
        expected=f"one of {', '.join(dict.fromkeys(str(base_folder / name) for name in names))}",
        remedy=f"correct `{split}` or `path`, relative to the folder of {file.name}",
    )


def _list_images(path: Path) -> list[Path]:
    if os.path.isdir(path):
        return list_folder(path).image_files()
    lines = [line.strip() for line in os.fsdecode(read_data_file(path)).split("\n")]
    listed_images = [
        find_existing(path.parent, line) or path.parent / line for line in lines if line
    ]
    unnamed = next((image for image in listed_images if not image.name), None)
    if unnamed is not None:
        raise UserError(
            f"{unnamed} is listed as an image",
            where=str(path),
            expected="one image path per line",
            remedy="correct the list",
        )
    return listed_images


def _open_from_class_names(source: Path) -> _YoloDataset | None:
    """Open a YOLO folder with a class name file instead of data.yaml.

    Returns None if the folder has no label files.
    """
    if not source.is_dir():
        return None
    images = list_folder(source).image_files()
    labelled_images = (path for path in images if os.path.isfile(_find_label_file(path)))
    label_files = [
        _find_label_file(path) for path in itertools.islice(labelled_images, NUM_DETECTION_FILES)
    ]
    lines = [line for file in label_files for line in _first_lines(file)]
    label_lines = [line for line in lines if line.strip()]
    # Tolerate some invalid lines; they are reported when their row is parsed.
    num_valid = sum(map(bool, map(_LABEL_LINE.fullmatch, label_lines)))
    if 2 * num_valid <= len(label_lines):
        return None
    for name in CLASS_NAME_FILES:
        if (source / name).is_file():
            name_lines = read_text_file(source / name, MAX_LABEL_FILE_BYTES).split("\n")
            # The class ID is the line number, also after an empty line.
            names = {n: text.strip() for n, text in enumerate(name_lines) if text.strip()}
            known_by = f"label files with class IDs, {name}"
            return _YoloDataset(names, tuple(("", path) for path in images), False, known_by)
    raise UserError(
        f"label files with class IDs, such as {label_lines[0]!r} in {label_files[0].name}, but"
        " no names",
        where=str(source),
        expected=f"data.yaml with `names`, or one of {', '.join(CLASS_NAME_FILES)}",
        remedy="write the names of the classes into classes.txt, one a line (0-based)",
    )


def _first_lines(file: Path) -> list[str]:
    """Return the complete lines within the first `SNIFF_BYTES` of a file."""
    with open_data_file(file) as content:
        start = content.read(SNIFF_BYTES)
    lines = start.decode("utf-8", "replace").splitlines()
    return lines[:-1] if len(start) == SNIFF_BYTES and len(lines) > 1 else lines


def _find_label_file(image: Path) -> Path:
    """Return the path of the label file of an image.

    This is the path with `images` replaced by `labels` if it exists, else the path next to the
    image.
    """
    parts = list(image.parts)
    if "images" in parts[:-1]:
        images_index = len(parts) - 2 - parts[-2::-1].index("images")
        parts[images_index] = "labels"
        inner_path = Path(*parts[images_index + 1 :]).with_suffix(".txt")
        mirrored = find_existing(Path(*parts[: images_index + 1]), str(inner_path))
        if mirrored is not None and mirrored.is_file():
            return mirrored
    sibling = image.with_suffix(".txt")
    return find_existing(sibling.parent, sibling.name) or sibling


def _parse_label_line(
    line: str, line_number: int, record: Record, source_notes: Counter[str]
) -> ObjectAnnotation:
    name = Path(record["labels"]).name
    fields = line.split()
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        values = []
    is_polygon = len(values) > 4 and len(values) % 2 == 0
    is_known = len(values) == 4 or is_polygon or (len(values) > 4 and record["keypoints"])
    if not is_known or not fields[0].isdecimal():
        raise InvalidBoxError(
            f"{name}:{line_number}: {line.strip()[:80]!r}",
            expected="a class ID, then center and size, or polygon corners",
            remedy="correct the line; labels have no sixth value (confidence)",
        )
    class_id = parse_integer(fields[0])
    if class_id not in record["names"]:
        raise UserError(
            f"{name}:{line_number}: class {fields[0][:40]}",
            expected=f"one of the {len(record['names'])} names (0-based)",
            remedy="add the name, or correct the line",
        )
    label = record["names"][class_id]
    if record["keypoints"] and len(values) > 4:
        source_notes[NOTE_KEYPOINTS] += 1
        return ObjectAnnotation(label, values[:4])
    if len(values) == 4:
        return ObjectAnnotation(label, values)
    corners = find_bounds(zip(values[::2], values[1::2], strict=True), values)
    bounds = enclose_shape("polygons", corners, source_notes)
    if bounds is None:
        return ObjectAnnotation(label, None)
    x1, y1, x2, y2 = bounds
    return ObjectAnnotation(label, [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def _format_labels(record: ImageRecord, classes: Sequence[str], context: ExportContext) -> str:
    height, width = context.image_size(record.image_path)
    lines = []
    for box in record.boxes:
        x1, y1, x2, y2 = box.xyxy
        centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        values = (*centre, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{classes.index(box.label)} {' '.join(f'{s:.12g}' for s in values)}\n")
    return "".join(lines)


FORMAT = DatasetFormat(
    name="yolo",
    description="a folder with data.yaml or classes.txt, images, and a .txt label file per image",
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_folder,
    write_files=write_files,
)
