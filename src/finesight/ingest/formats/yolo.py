"""YOLO: a label file per image with lines `class cx cy width height`.

A dataset consists of dataset/data.yaml (names, train, val), images/train/a.jpg and
labels/train/a.txt, or of a single folder with classes.txt. Coordinates are normalized to the image
size, and the class is an index of the list of names. Labels are next to the image, or in the path
with `images` replaced by `labels`.

An empty label file is an image without objects. Values after the box are keypoints if data.yaml has
`kpt_shape`, and ignored if only the first labels have this shape; else they are polygons. Splits
are ordered train, test, val, so that --eval-last uses the last one for validation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import find_existing, load_yaml
from finesight.ingest.folder_listing import list_folder
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.ingest.formats.image_annotations import (
    NOTE_UNLABELED,
    ObjectAnnotation,
    Outlines,
    assign_text_file,
    build_detection_examples,
    collect_classes,
    enclose_shape,
    group_by_image,
    parse_integer,
    require_inside_output,
)
from finesight.ingest.row_reader import SNIFF_BYTES, Record, RowReader, SourceRow, rows_from_items
from finesight.samples.boxes import InvalidBoxError, find_bounds
from finesight.samples.frames import get_frame
from finesight.samples.line_index import open_data_file
from finesight.samples.sample import (
    MAX_BOXES,
    MAX_DESCRIPTION_BYTES,
    MAX_LABEL_FILE_BYTES,
    LocatedSample,
    read_data_file,
    read_text_file,
)

YOLO_FRAME = get_frame("cxcywh", "1")
SPLITS = ("train", "test", "val")
CLASS_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels")
REASON_NO_LABEL_FILE = "images without a label file"
NOTE_KEYPOINTS = "keypoints (ignored)"
NOTE_ASSUMED_KEYPOINTS = "values after the box, taken for keypoints without kpt_shape (ignored)"
NUM_DETECTION_FILES = 20

_UPWARDS = re.compile(r"^(?:\.\./)+")


def open_yolo(source: Path) -> tuple[RowReader, str] | None:
    """Open a YOLO dataset as rows, one per image.

    The source is a folder with data.yaml or with class names and label files, or the YAML file."""
    is_yaml = source.suffix.lower() in (".yaml", ".yml") and source.is_file()
    files = [source] if is_yaml else sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    for file in files:
        try:
            description = load_yaml(read_data_file(file, MAX_DESCRIPTION_BYTES))
        except yaml.YAMLError:  # may belong to another program
            continue
        if isinstance(description, dict) and "names" in description:
            names = _parse_class_names(description["names"], file)
            images = tuple(_iter_split_images(description, file))
            if not images:
                raise UserError(
                    "no images are found",
                    where=str(file),
                    expected="images in the folders or lists of train, val and test",
                    remedy="correct these paths, relative to the folder of the file",
                )
            known_by, pose = f"names in {file.name}", _read_keypoints(description, names, file)
            return _build_rows(source, names, images, known_by, *pose)
    return _open_from_class_names(source)


def _build_rows(
    source: Path,
    class_names: Mapping[int, str],
    images: Sequence[tuple[str, Path]],
    detected_by: str,
    keypoints: Mapping[int, Sequence[str]] | None = None,
    pose_length: int = 0,
) -> tuple[RowReader, str]:
    """Return a row for each image of a YOLO dataset, and the reason for the match.

    Args:
        images: Split and path of each image; the split is "" in a dataset without splits.
        keypoints: Names of the keypoints after the box by class ID; None without keypoints.
        pose_length: Number of values of a box with these keypoints.
    """
    names = list(class_names.values())
    if keypoints is None:
        pose_length = _find_pose_length([*map(_parse_values, _iter_first_lines(images))])

    def make_row(row_number: int, split_image: tuple[str, Path]) -> SourceRow:
        split, image = split_image
        label = _find_label_file(image)
        record = {
            "id": image.stem,
            "image": str(image),
            "labels": str(label),
            "names": class_names,
            "classes": names,
            "pose_length": pose_length,
            "keypoints": keypoints,
            "points": list(itertools.chain(*(keypoints or {}).values())),
            "meta": {"split": split} if split else {},
        }
        return SourceRow(row_number, str(label), record, source.stem)

    counts = Counter(split for split, _ in images if split)
    parts = ", ".join(f"{split} {count}" for split, count in counts.items())
    reason = f"{detected_by}: {format_count(len(names), 'class')}"
    if parts:
        reason += f", images: {parts}"
    stems = {image.stem for _, image in images}
    texts = list_folder(source if source.is_dir() else source.parent).files_with_suffix(".txt")
    others = [("", one) for one in texts if one.stem not in stems]
    if any(len(_parse_values(line)) >= 4 for line in _iter_first_lines(others)):
        reason += f"; {len(others)} .txt files of no listed image, not read"
    return rows_from_items(images, make_row), reason


def parse_yolo(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a YOLO dataset."""
    record = row.record
    label_file = Path(record["labels"])
    if not os.path.isfile(label_file):
        context.skipped_rows[REASON_NO_LABEL_FILE] += 1
        return []
    text = read_data_file(label_file, MAX_LABEL_FILE_BYTES).decode("utf-8", "replace")
    objects = [
        _parse_label_line(line, line_number, record, context)
        for line_number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    image, meta = record["image"], record["meta"]
    return build_detection_examples(row, context, YOLO_FRAME, image, objects, meta=meta)


def write_yolo(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
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
        height, width = context.image_size(record.image_path)
        lines = []
        for box in record.boxes:
            x1, y1, x2, y2 = box.xyxy
            center = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
            values = (*center, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{classes.index(box.label)} {' '.join(f'{s:.12g}' for s in values)}\n")
        yield assign_text_file(name, used_names), "".join(lines).encode()
    for split, names in images_by_split.items():
        yield f"{split}.txt", "".join(names).encode()
    if "val" not in images_by_split:
        context.notes.append(
            "no image is in the split `val`, which Ultralytics requires: add a list to data.yaml"
        )
    description = {
        **{split: f"{split}.txt" for split in SPLITS if split in images_by_split},
        "names": dict(enumerate(classes)),
    }
    yield "data.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode()


def _read_keypoints(
    description: Record, class_names: Mapping[int, str], file: Path
) -> tuple[dict[int, list[str]] | None, int]:
    """Return names or numbers of keypoints by class, and the length of a label."""
    if "kpt_shape" not in description:
        return None, 0
    shape: Any = as_list(description["kpt_shape"])
    by_class = description.get("kpt_names")
    by_class = by_class if isinstance(by_class, dict) else {}
    counts = {len(names) for one in by_class if (names := as_list(by_class[one]))}
    is_shape = len(shape) == 2 and all(type(one) is int for one in shape)
    is_shape = is_shape and shape[0] in range(1, MAX_BOXES + 1) and shape[1] in (2, 3)
    if not is_shape or counts - {shape[0]}:
        raise UserError(
            f"kpt_shape is {reprlib.repr(description['kpt_shape'])}, and kpt_names have"
            f" {', '.join(map(str, sorted(counts))) or 'no'} names",
            where=str(file),
            expected="[number of keypoints, 2 or 3], and as many names",
            remedy="correct kpt_shape or kpt_names",
        )
    numbers = range(1, shape[0] + 1)
    keypoints = {
        class_id: [f"{name} {one}" for one in as_list(by_class.get(class_id)) or numbers]
        for class_id, name in class_names.items()
    }
    return keypoints, 4 + shape[0] * shape[1]


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


def _open_from_class_names(source: Path) -> tuple[RowReader, str] | None:
    """Open a YOLO folder with a class name file instead of data.yaml.

    Returns None if the folder has no label files.
    """
    images = [("", path) for path in list_folder(source).image_files()]
    label_lines = list(_iter_first_lines(images))
    # Tolerate some invalid lines; they are reported when their row is parsed.
    num_valid = sum(len(_parse_values(line)) >= 4 for line in label_lines)
    if 2 * num_valid <= len(label_lines):
        return None
    for name in CLASS_NAME_FILES:
        if (source / name).is_file():
            name_lines = read_text_file(source / name, MAX_LABEL_FILE_BYTES).split("\n")
            # The class ID is the line number, also after an empty line.
            names = {n: text.strip() for n, text in enumerate(name_lines) if text.strip()}
            known_by = f"label files with class IDs, {name}"
            return _build_rows(source, names, images, known_by)
    raise UserError(
        f"label files with class IDs, such as {label_lines[0]!r}, but no names",
        where=str(source),
        expected=f"data.yaml with `names`, or one of {', '.join(CLASS_NAME_FILES)}",
        remedy="write the names of the classes into classes.txt, one a line (0-based)",
    )


def _iter_first_lines(images: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """Yield the lines within the first `SNIFF_BYTES` of the first label files."""
    files = filter(os.path.isfile, (_find_label_file(path) for _, path in images))
    for file in itertools.islice(files, NUM_DETECTION_FILES):
        with open_data_file(file) as content:
            start = content.read(SNIFF_BYTES)
        lines = start.decode("utf-8", "replace").splitlines()
        is_cut = len(start) == SNIFF_BYTES and len(lines) > 1
        yield from (line for line in lines[: len(lines) - is_cut] if line.strip())


def _parse_values(line: str) -> list[float]:
    """Return the numbers after the class ID of a label line; empty if the line is invalid."""
    class_id, *fields = line.split() or [""]
    with contextlib.suppress(ValueError):
        return [float(field) for field in fields] if class_id.isdecimal() else []
    return []


def _find_pose_length(labels: Sequence[Sequence[float]]) -> int:
    """Return the number of values of labels of boxes with keypoints; 0 if they are polygons.

    Keypoints have two values, or three with the visibility 0, 1 or 2.
    """
    lengths = {len(values) for values in labels if len(values) > 4}
    poses = [values for values in labels if len(values) > 4] if len(lengths) == 1 else []
    for size in (3, 2):
        if 2 * sum(_is_pose(values, size) for values in poses) > len(poses):
            return lengths.pop()
    return 0


def _is_pose(values: Sequence[float], size: int) -> bool:
    """Return whether values are a box and keypoints of `size` values in or near this box.

    In a polygon, the second point, which is the size of the box of a pose, is near the others.
    """
    x, y, width, height, *rest = values
    points = [(a, b) for a, b in zip(rest[::size], rest[1::size], strict=False) if a or b]
    if len(rest) % size or not all(abs(a - x) < width and abs(b - y) < height for a, b in points):
        return False
    if size == 3:
        return {0.0, 1.0, 2.0}.issuperset(rest[2::3])
    left, top, right, bottom = find_bounds([(x, y), *points], values)
    reach = max(right - left, bottom - top)
    return not (left - reach <= width <= right + reach and top - reach <= height <= bottom + reach)


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
    line: str, line_number: int, record: Record, context: ImportContext
) -> ObjectAnnotation:
    name = Path(record["labels"]).name
    values, pose_length = _parse_values(line), record["pose_length"]
    is_pose, keypoints = len(values) == pose_length > 4, record["keypoints"]
    is_polygon = keypoints is None and len(values) % 2 == 0
    if len(values) < 4 or not (is_pose or is_polygon or len(values) == 4):
        further = "polygon corners"
        if keypoints is not None:
            further = f"{pose_length} values with keypoints"
        raise InvalidBoxError(
            f"{name}:{line_number}: {line.strip()[:80]!r}",
            expected=f"a class ID, then center and size, or {further}",
            remedy="correct the line; labels have no sixth value (confidence)",
        )
    class_id = parse_integer(line.split()[0])
    if class_id not in record["names"]:
        raise UserError(
            f"{name}:{line_number}: class {line.split()[0][:40]}",
            expected=f"one of the {len(record['names'])} names (0-based)",
            remedy="add the name, or correct the line",
        )
    label = record["names"][class_id]
    if is_pose or len(values) == 4:
        note = NOTE_ASSUMED_KEYPOINTS if keypoints is None else NOTE_KEYPOINTS
        context.shape_notes[note] += is_pose
        names: Sequence[str] = ()
        if is_pose:
            names = (keypoints or {}).get(class_id, ())
        size = (len(values) - 4) // max(1, len(names))
        entries = [values[4 + n * size :][:size] for n in range(len(names))]
        # Two values that are 0 without the point, or two values and a visibility.
        points = [
            (name, entry[:2])
            for name, entry in zip(names, entries, strict=True)
            if any(entry[:2]) and all(entry[2:])
        ]
        num_given = sum(any(entry[:2]) for entry in entries)
        is_points = context.box_task == "points"
        context.row_notes[NOTE_UNLABELED] += (num_given - len(points)) * is_points
        return ObjectAnnotation(label, values[:4], points=points)
    corners = [*zip(values[::2], values[1::2], strict=True)]
    outlines = Outlines([corners])
    bounds = enclose_shape("polygons", find_bounds(corners, values), context, outlines)
    if bounds is None:
        return ObjectAnnotation(label, None, outlines)
    x1, y1, x2, y2 = bounds
    return ObjectAnnotation(label, [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], outlines)


COMPONENT = DatasetFormat(
    name="yolo",
    description="a folder with data.yaml or classes.txt, images, and a .txt label file per image",
    parse_row=parse_yolo,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_yolo,
    write_files=write_yolo,
    # Before `folder`: label files are texts of the same name, too.
    position=20,
)
