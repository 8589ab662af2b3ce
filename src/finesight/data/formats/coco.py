"""COCO JSON, captions or instances: a document of images, annotations and categories.

{"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
 "annotations": [{"id": 7, "image_id": 1, "category_id": 2, "bbox": [x, y, width, height]}],
 "categories": [{"id": 2, "name": "dog"}]}

A box is its top left corner and size in pixels, 0-based. Without a box, the enclosing box of the
polygons in `segmentation` is used. Several captions of an image are answers to the same question.
Crowd regions and other annotations have no box. Area and keypoints are ignored.

Images are searched in the folder of the document, its parent, `images` in either, and other
subfolders. The first folder that contains all images is used, else the folder that contains most.
If several folders match, the one whose name occurs in the name of the document is used.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.bounded_files import find_existing, parse_unique_json
from finesight.data.boxes import BoxConvention, find_bounds
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    InvalidOptionError,
)
from finesight.data.formats.image_annotations import (
    LOST_WHITESPACE,
    ImageAnnotation,
    ImageRecord,
    ObjectAnnotation,
    build_detection_examples,
    build_text_example,
    collect_classes,
    enclose_shape,
    group_answers_by_image,
    parse_declared_size,
    round_coordinate,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.row_reader import Record, RowReader, SourceRow, is_json_object, rows_from_items
from finesight.data.sample import LocatedSample, read_data_file
from finesight.errors import UserError

COCO_BOX_CONVENTION = BoxConvention(format="xywh")
_IMAGE_KEYS = ("id", "file_name", "width", "height", "license")
_ANNOTATION_KEYS = (
    *("id", "image_id", "category_id", "bbox", "caption", "iscrowd", "area"),
    *("segmentation", "keypoints", "num_keypoints"),
)
REASON_NO_CAPTION = "images without a caption"
NUM_PROBED_IMAGES = 500
"""Approximate number of images that are looked up to find the image folder."""

UNSUPPORTED_KEYS = ("segmentation", "keypoints")


def open_document(source: Path) -> tuple[RowReader, str] | None:
    """Open a COCO JSON document as rows, one per image.

    Returns:
        The rows and the reason for the match, or None if the file is not a COCO document.
    """
    document = _read_document(source)
    if document is None:
        return None
    images, annotations = document["images"], document["annotations"]
    has_boxes = any(key in item for item in annotations for key in ("bbox", "segmentation"))
    if not images or not (has_boxes or any("caption" in item for item in annotations)):
        raise UserError(
            f"{len(images)} images, {len(annotations)} annotations, none with bbox or caption",
            where=str(source),
            expected="annotations with `bbox` (instances) or `caption`",
            remedy="use the document of the instances or of the captions",
        )
    ids = Counter(str(image.get("id")) for image in images)
    _reject_duplicate_ids(ids, source)
    folder = find_image_folder(source, [_get_file_name(image) for image in images])
    names = {
        str(item.get("id")): item["name"]
        for item in document["categories"]
        if isinstance(item.get("name"), str) and item["name"].strip()
    }
    by_image: defaultdict[str, list[Record]] = defaultdict(list)
    for annotation in annotations:
        by_image[str(annotation.get("image_id"))].append(annotation)

    def make_row(row_number: int, image: Record) -> SourceRow:
        name = _get_file_name(image)
        record = {
            "id": Path(name).stem,
            "image": image,
            "path": str(find_existing(folder, name) or folder / name),
            "annotations": by_image.get(str(image.get("id")), []),
            "names": names if has_boxes else None,
        }
        return SourceRow(row_number, f"image {image.get('id')} ({name})", record, source.stem)

    task = f"instances of {len(names)} classes" if has_boxes else "captions"
    label_key = "bbox" if has_boxes else "caption"
    reason = f"images, annotations with {label_key}: COCO {task}, images in {folder}"
    num_unlisted = sum(image_id not in ids for image_id in by_image)
    reason += (
        f"; annotations of {num_unlisted} images that it does not list" if num_unlisted else ""
    )
    return rows_from_items(images, make_row), reason


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a COCO document."""
    image, annotations = row.record["image"], row.record["annotations"]
    count_keys([image], _IMAGE_KEYS, "images", context.other_keys)
    count_keys(annotations, _ANNOTATION_KEYS, "annotations", context.other_keys)
    meta = {"image_id": image.get("id"), "license": image.get("license")}
    meta = {key: value for key, value in meta.items() if value is not None}
    if row.record["names"] is None:
        return _parse_captions(row, annotations, meta, context)
    names: dict[str, str] = row.record["names"]
    source_notes: Counter[str] = Counter()
    is_coco = context.resolve_convention(COCO_BOX_CONVENTION) == COCO_BOX_CONVENTION
    objects = [
        ObjectAnnotation(_get_class_name(one, names), _find_box(one, source_notes, is_coco))
        for one in annotations
    ]
    image_annotation = ImageAnnotation(
        row.record["path"],
        objects,
        list(names.values()),
        parse_declared_size(image.get("height"), image.get("width")),
        meta,
        source_notes,
    )
    return build_detection_examples(row, image_annotation, context, COCO_BOX_CONVENTION)


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write a COCO document, of instances if any answer contains a box, else of captions."""
    records, is_detection = group_answers_by_image(samples, context, {"image_id", "license"})
    classes = collect_classes(records)
    declared_ids = [record.meta.get("image_id") for record in records]
    ids = [value for value in declared_ids if isinstance(value, int)]
    if len(set(ids)) < len(records):
        ids = list(range(1, len(records) + 1))
    annotations: list[Record] = []
    for image_id, record in zip(ids, records, strict=True):
        record_annotations = (
            _iter_annotations(record, classes)
            if is_detection
            else [{"caption": text} for text in record.answers]
        )
        context.lost_counts[LOST_WHITESPACE] += sum(text != text.strip() for text in record.answers)
        first_id = len(annotations) + 1
        annotations += [
            {"id": number, "image_id": image_id, **annotation}
            for number, annotation in enumerate(record_annotations, start=first_id)
        ]
    document = {
        "images": [
            _build_image(i, record, context) for i, record in zip(ids, records, strict=True)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
    }
    if not is_detection:
        del document["categories"]
    yield "annotations.json", (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def _read_document(source: Path) -> dict[str, list[Record]] | None:
    """Return the lists of images, annotations and categories of a COCO document, else None."""
    content = read_data_file(source) if is_json_object(source) else b""
    if b'"annotations"' not in content:
        return None
    try:
        document = parse_unique_json(content)
    except ValueError:
        return None  # JSON Lines or invalid: the row reader reports it
    lists = {key: document.get(key) or [] for key in ("images", "annotations", "categories")}
    if not all(isinstance(items, list) for items in lists.values()):
        return None
    return lists if all(isinstance(r, dict) for items in lists.values() for r in items) else None


def _reject_duplicate_ids(ids: Counter[str], source: Path) -> None:
    duplicate, count = ids.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} images have the id {duplicate}",
            where=str(source),
            expected="a unique ID per image",
            remedy="assign new IDs to the images and their annotations",
        )


def find_image_folder(source: Path, names: Sequence[str]) -> Path:
    """Return the folder that contains the images of a document; see the module docstring.

    Args:
        names: Paths of the images with forward slashes, as written in the document.
    """
    names = names[:: max(1, len(names) // NUM_PROBED_IMAGES)]
    tried_folders: list[Path] = []
    max_found, best_folders = 0, list[Path]()
    for candidates in _iter_candidate_folders(source.parent.resolve() / source.name):
        tried_folders += candidates
        num_found = {
            folder: sum(find_existing(folder, n) is not None for n in names)
            for folder in candidates
        }
        if max(num_found.values(), default=0) > max_found:
            max_found = max(num_found.values())
            best_folders = [folder for folder in candidates if num_found[folder] == max_found]
        if max_found == len(names):
            break
    if not max_found:
        raise UserError(
            f"none of {len(names)} images is found, such as {names[0]!r}",
            where=str(source),
            expected=f"images in one of {', '.join(map(str, tried_folders))}",
            remedy="move the images to a folder `images` next to the document",
        )
    name_matches = [folder for folder in best_folders if folder.name in source.stem]
    if len(best_folders) > 1 and len(name_matches) != 1:
        raise UserError(
            f"images of these names, such as {names[0]!r}, are in {len(best_folders)} folders",
            where=str(source),
            expected=f"one of {', '.join(map(str, best_folders))}",
            remedy="add the folder to file_name, or move the document into the folder",
        )
    return (name_matches if len(best_folders) > 1 else best_folders)[0]


def _get_file_name(image: Record) -> str:
    """Return the file name of an image with forward slashes; some tools write backslashes."""
    return str(image.get("file_name")).replace("\\", "/")


def _iter_candidate_folders(source: Path) -> Iterator[list[Path]]:
    """Yield groups of folders that may contain the images, the closest to the document first."""
    base_folders = (source.parent, source.parent.parent)
    yield from ([base_folder] for base_folder in base_folders)
    yield from ([base_folder / "images"] for base_folder in base_folders)
    for base_folder in base_folders:
        yield [*_list_subfolders(base_folder), *_list_subfolders(base_folder / "images")]


def _list_subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "images")
    except OSError:  # missing or unreadable folder
        return []


def _find_box(
    annotation: Record, source_notes: Counter[str], use_polygons: bool
) -> Sequence[object] | None:
    """Return the box of an annotation, or the enclosing box of its polygons, else None."""
    polygons = annotation.get("segmentation")
    if annotation.get("iscrowd"):
        return enclose_shape("crowd regions", None, source_notes)
    if annotation.get("bbox"):
        source_notes.update(f"{k} (ignored)" for k in UNSUPPORTED_KEYS if annotation.get(k))
        return annotation["bbox"]  # type: ignore[no-any-return]  # validated as coordinates
    if not use_polygons or not isinstance(polygons, list) or not polygons:
        return enclose_shape("annotations without a box", None, source_notes)
    corners = [
        zip(flat[::2], flat[1::2], strict=False) for flat in polygons if isinstance(flat, list)
    ]
    bounds = find_bounds(itertools.chain(*corners), annotation)
    box = enclose_shape("polygons", bounds, source_notes)
    return box and [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _get_class_name(annotation: Record, names: dict[str, str]) -> str:
    category = str(annotation.get("category_id"))
    if category not in names:
        raise UserError(
            f"annotation {annotation.get('id')} is of category {category}",
            expected=f"one of the {len(names)} categories of the document",
            remedy="add the category, or remove the annotation",
        )
    return names[category]


def _parse_captions(
    row: SourceRow, annotations: Sequence[Record], meta: Record, context: ImportContext
) -> list[ImportExample]:
    if context.box_task != "detection":
        raise InvalidOptionError(
            f"{context.box_task} of captions",
            where="--box-task",
            expected="a document of instances, with boxes",
            remedy="remove --box-task, or use the document of the instances",
        )
    texts = [_read_caption(annotation) for annotation in annotations if "caption" in annotation]
    if not texts:
        context.skipped_rows[REASON_NO_CAPTION] += 1
        return []
    return [build_text_example(row.id, row.record["path"], texts, (), context, meta)]


def _read_caption(annotation: Record) -> str:
    text = annotation["caption"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"annotation {annotation.get('id')} has the caption {str(text)[:60]!r}",
            expected="a text",
            remedy="add one, or remove the annotation",
        )
    return text.strip()


def _build_image(image_id: int, image_record: ImageRecord, context: ExportContext) -> Record:
    height, width = context.image_size(image_record.image_path)
    entry = {
        "id": image_id,
        "file_name": context.image_name(image_record.image_path),
        "width": width,
        "height": height,
    }
    return (
        entry
        if "license" not in image_record.meta
        else {**entry, "license": image_record.meta["license"]}
    )


def _iter_annotations(record: ImageRecord, classes: Sequence[str]) -> Iterator[Record]:
    for box in record.boxes:
        x1, y1, x2, y2 = box.xyxy
        width, height = round_coordinate(x2 - x1), round_coordinate(y2 - y1)
        yield {
            "category_id": classes.index(box.label) + 1,
            "bbox": [round_coordinate(x1), round_coordinate(y1), width, height],
            "area": round_coordinate(width * height),
            "iscrowd": 0,
        }


FORMAT = DatasetFormat(
    name="coco",
    description='a .json file of {"images": [...], "annotations": [...], "categories": [...]}',
    typical_keys=frozenset({"annotations", "categories"}),
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_document,
    write_files=write_files,
)
