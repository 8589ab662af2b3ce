"""COCO: a document of captions or instances.

A box is its top left corner and size in pixels, 0-based, or the enclosing box of the polygons or of
the mask in `segmentation`. Several captions of an image are answers to the same question. Crowd
regions and other annotations have no box.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import find_existing
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    InvalidOptionError,
    as_list,
)
from finesight.ingest.formats.image_annotations import (
    LOST_WHITESPACE,
    NO_OUTLINES,
    NOTE_UNLABELED,
    ImageRecord,
    ObjectAnnotation,
    Outlines,
    build_detection_examples,
    build_text_example,
    collect_classes,
    decode_counts,
    decode_runs,
    enclose_mask,
    enclose_shape,
    find_image_folder,
    group_by_image,
    round_coordinate,
    trace_mask,
)
from finesight.ingest.formats.json_annotations import read_document
from finesight.ingest.formats.row_keys import count_keys, reject_texts
from finesight.ingest.row_reader import Record, RowReader, SourceRow, rows_from_items
from finesight.samples.boxes import InvalidBoxError, find_bounds, translate_shape_errors
from finesight.samples.frames import BoxFrame
from finesight.samples.sample import MAX_BOXES, LocatedSample, count_ids

COCO_FRAME = BoxFrame("xywh")
_LIST_KEYS = ("images", "annotations", "categories")
_IMAGE_KEYS = ("id", "file_name", "width", "height", "license")
_ANNOTATION_KEYS = (
    "id",
    "image_id",
    "category_id",
    "bbox",
    "iscrowd",
    "ignore",
    "area",
    "segmentation",
    "keypoints",
    "num_keypoints",
)
_OBJECT_KEYS = frozenset(("bbox", "segmentation", "category_id"))
REASON_NO_CAPTION = "images without a caption"
TEXTS_REMEDY = (
    "if the texts belong neither to the question nor to the answer, import this file with --format"
    " coco; else name them in a mapping file (--mapping) with the lists as tables (page Mapping"
    " files)"
)
UNSUPPORTED_KEYS = ("segmentation", "keypoints")


def _open_coco(source: Path) -> tuple[RowReader, str] | None:
    """Open a COCO JSON document as rows, one per image."""
    document = read_document(source, b'"annotations"') or {}
    lists = [document.get(key) or [] for key in _LIST_KEYS]
    if not document or not all(isinstance(items, list) for items in lists):
        return None
    if not all(isinstance(item, dict) for item in itertools.chain(*lists)):
        return None
    images, annotations, categories = lists
    box_keys = ("bbox", "segmentation", "keypoints")
    has_boxes = any(key in item for item in annotations for key in box_keys)
    has_captions = any("caption" in item for item in annotations)
    if not ("images" in document or has_boxes or has_captions):
        return None  # another document with annotations
    if not images or not (has_boxes or has_captions):
        raise UserError(
            f"{len(images)} images, {len(annotations)} annotations, none with bbox or caption",
            where=str(source),
            expected="annotations with `bbox` (instances) or `caption`",
            remedy="use the document of the instances or of the captions",
        )
    ids = count_ids("images", (_get_id(one, "id") for one in images), source)
    count_ids("categories", (_get_id(one, "id") for one in categories), source)
    folder = find_image_folder(source, [_get_file_name(image) for image in images])
    names = {
        _get_id(item, "id"): item["name"]
        for item in categories
        if isinstance(item.get("name"), str) and item["name"].strip()
    }
    by_image: defaultdict[str, list[Record]] = defaultdict(list)
    num_keypoints: defaultdict[str, int] = defaultdict(int)
    for annotation in annotations:
        by_image[_get_id(annotation, "image_id")].append(annotation)
        category = _get_id(annotation, "category_id")
        count = min(MAX_BOXES, len(as_list(annotation.get("keypoints"))) // 3)
        num_keypoints[category] = max(num_keypoints[category], count)
    keypoints: dict[str, list[str]] = {}
    for item in categories:
        category, key_names = _get_id(item, "id"), as_list(item.get("keypoints"))
        numbers = range(len(key_names) + 1, num_keypoints[category] + 1)
        keypoints[category] = [f"{item.get('name')} {one}" for one in (*key_names, *numbers)]

    def make_row(row_number: int, image: Record) -> SourceRow:
        name = _get_file_name(image)
        record = {
            "id": Path(name).stem,
            "image": image,
            "path": str(find_existing(folder, name) or folder / name),
            "annotations": by_image.get(_get_id(image, "id"), []),
            "names": names if has_boxes else None,
            "classes": list(names.values()),
            "keypoints": keypoints,
            "points": list(itertools.chain(*keypoints.values())),
        }
        return SourceRow(row_number, f"image {image.get('id')} ({name})", record, source.stem)

    task = "captions"
    label_key = "caption"
    if has_boxes:
        task = f"instances of {format_count(len(names), 'class')}"
        label_key = "bbox"
    reason = f"images, annotations with {label_key}: COCO {task}, images in {folder}"
    num_unlisted = sum(image_id not in ids for image_id in by_image)
    if num_unlisted == len(by_image):
        raise UserError(
            f"no annotation has the image_id of an image, such as {min(ids)}",
            where=str(source),
            expected=f"IDs of images instead of {', '.join(by_image)[:80]}",
            remedy="correct `image_id` of the annotations, or `id` of the images",
        )
    if num_unlisted:
        reason += f"; annotations of {num_unlisted} images that it does not list"
    other_keys: Counter[str] = Counter()
    count_keys([dict.fromkeys(document, 1)], _LIST_KEYS, "files", other_keys)
    count_keys(categories, ("id", "name", "keypoints"), "categories", other_keys)
    return replace(rows_from_items(images, make_row), other_keys=other_keys), reason


def _check_texts(row: SourceRow) -> None:
    """Reject texts beside the boxes of an image, which would be left out."""
    if row.record["names"] is None:
        return  # captions
    reject_texts([row.record["image"]], _IMAGE_KEYS, "images", TEXTS_REMEDY)
    reject_texts(row.record["annotations"], _ANNOTATION_KEYS, "annotations", TEXTS_REMEDY)


def _parse_coco(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of an image in a COCO document."""
    image, annotations = row.record["image"], row.record["annotations"]
    count_keys([image], _IMAGE_KEYS, "images", context.other_keys)
    is_caption = row.record["names"] is None
    used_keys = [*_ANNOTATION_KEYS]
    if is_caption:
        used_keys.append("caption")
    count_keys(annotations, used_keys, "annotations", context.other_keys)
    meta = {"image_id": image.get("id"), "license": image.get("license")}
    meta = {key: value for key, value in meta.items() if value is not None}
    if is_caption:
        return _parse_captions(row, annotations, meta, context)
    names: dict[str, str] = row.record["names"]
    shapes = [one.get("segmentation") for one in annotations]
    sizes = [as_list(one.get("size")) for one in shapes if isinstance(one, dict)]
    size: Any = (image.get("height"), image.get("width"))
    if sizes and not all(isinstance(side, int) for side in size):
        size = (*sizes[0], None, None)[:2]
    is_coco = context.resolve_frame(COCO_FRAME) == COCO_FRAME
    objects = [
        ObjectAnnotation(
            _get_class_name(one, names),
            *_find_box(one, context, size, use_polygons=is_coco),
            points=_list_points(one, row.record["keypoints"], context),
        )
        for one in annotations
        if "caption" not in one or not _OBJECT_KEYS.isdisjoint(one)
    ]
    path = row.record["path"]
    return build_detection_examples(
        row, context, COCO_FRAME, path, objects, declared_size=size, meta=meta
    )


def _write_coco(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write a COCO document, of instances if any answer contains a box, else of captions."""
    records, is_detection = group_by_image(samples, context, {"image_id", "license"})
    classes = collect_classes(records)
    declared_ids = [record.meta.get("image_id") for record in records]
    ids = [value for value in declared_ids if isinstance(value, int)]
    if len(set(ids)) < len(records):
        ids = list(range(1, len(records) + 1))
    images: list[Record] = []
    annotations: list[Record] = []
    for image_id, record in zip(ids, records, strict=True):
        height, width = context.image_size(record.image_path)
        name = context.image_names[record.image_path]
        image = {"id": image_id, "file_name": name, "width": width, "height": height}
        images.append(image | {k: v for k, v in record.meta.items() if k == "license"})
        context.lost_counts[LOST_WHITESPACE] += sum(text != text.strip() for text in record.answers)
        for annotation in _iter_annotations(record, classes):
            ids_of_both = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids_of_both | annotation)
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
    }
    if not is_detection:
        del document["categories"]
    yield "annotations.json", (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def _get_file_name(image: Record) -> str:
    """Return the file name of an image with forward slashes; LVIS has its URL only."""
    name = image.get("file_name") or urlsplit(str(image.get("coco_url"))).path.lstrip("/")
    return str(name).replace("\\", "/")


def _find_box(
    annotation: Record, context: ImportContext, image_size: tuple[Any, Any], *, use_polygons: bool
) -> tuple[Sequence[object] | None, Outlines]:
    """Return the box of an annotation, or else that of its polygons or mask, and its outlines."""
    num_values, is_polygons = len(as_list(annotation.get("bbox"))), context.box_task == "polygons"
    has_box = num_values in (1, 3, 4)  # two are no box but a point
    if annotation.get("iscrowd") or annotation.get("ignore"):
        return enclose_shape("crowd regions", None, context), NO_OUTLINES
    is_used = is_polygons or (use_polygons and not has_box)
    outlines = NO_OUTLINES
    if is_used:
        outlines = _read_outlines(annotation, image_size, context)
    if has_box:
        ignored = UNSUPPORTED_KEYS[is_polygons:]
        context.shape_notes.update(f"{key} (ignored)" for key in ignored if annotation.get(key))
        return annotation["bbox"], outlines
    if not outlines.polygons:
        kind = f"boxes of {num_values} values" if num_values else "annotations without a box"
        return enclose_shape(kind, None, context), outlines
    kind = "polygons" if isinstance(annotation["segmentation"], list) else "masks"
    bounds = find_bounds(itertools.chain(*outlines.polygons), annotation)
    box = enclose_shape(kind, bounds, context, outlines)
    return box and [box[0], box[1], box[2] - box[0], box[3] - box[1]], outlines


def _read_outlines(
    annotation: Record, image_size: tuple[Any, Any], context: ImportContext
) -> Outlines:
    """Return the polygons of an annotation, or the outlines of its mask."""
    shape = annotation.get("segmentation")
    if not shape:
        return NO_OUTLINES
    with translate_shape_errors(annotation, "`segmentation` of `size` and `counts`, or polygons"):
        if isinstance(shape, list):
            if not all(isinstance(one, list) and one for one in shape):
                raise ValueError("a part that is no list of numbers")
            return Outlines([[*zip(one[::2], one[1::2], strict=True)] for one in shape])
        counts, size = shape["counts"], tuple(shape["size"])
        if size != image_size:
            raise ValueError(f"a mask of {size} in an image of {image_size}")
        counts = decode_counts(counts) if isinstance(counts, str) else counts
        outline_mask = trace_mask if context.box_task == "polygons" else enclose_mask
        return outline_mask(decode_runs(counts, size, "F"))


def _list_points(
    annotation: Record, names: Mapping[str, Sequence[str]], context: ImportContext
) -> list[tuple[str, Sequence[object]]]:
    """Return the labeled keypoints of an annotation with their names."""
    flat = as_list(annotation.get("keypoints"))
    if context.box_task != "points":
        return []
    if len(flat) % 3 or not all(visibility in (0, 1, 2) for visibility in flat[2::3]):
        raise InvalidBoxError(
            f"the keypoints {str(flat)[:80]}",
            expected="x, y and the visibility 0, 1 or 2 of each keypoint",
            remedy="correct the annotation, or remove its keypoints",
        )
    category_names = names.get(_get_id(annotation, "category_id"), ())
    columns = [*zip(category_names, flat[::3], flat[1::3], flat[2::3], strict=False)]
    context.row_notes[NOTE_UNLABELED] += sum(not v and bool(x or y) for _, x, y, v in columns)
    return [(name, (x, y)) for name, x, y, visibility in columns if visibility]


def _get_id(item: Record, key: str) -> str:
    """Return an ID as text; pandas writes whole numbers as 1.0."""
    value = item.get(key)
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _get_class_name(annotation: Record, names: dict[str, str]) -> str:
    category = _get_id(annotation, "category_id")
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
    texts = []
    for annotation in (one for one in annotations if "caption" in one):
        text = annotation["caption"]
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"annotation {annotation.get('id')} has the caption {str(text)[:60]!r}",
                expected="a text",
                remedy="add one, or remove the annotation",
            )
        texts.append(text.strip())
    context.skipped_rows[REASON_NO_CAPTION] += not texts
    path = row.record["path"]
    return [build_text_example(row.id, path, texts, (), context, meta)] if texts else []


def _iter_annotations(record: ImageRecord, classes: Sequence[str]) -> Iterator[Record]:
    yield from ({"caption": text} for text in record.answers)
    for box in record.boxes:
        x1, y1, x2, y2 = box.xyxy
        width, height = round_coordinate(x2 - x1), round_coordinate(y2 - y1)
        yield {
            "category_id": classes.index(box.label) + 1,
            "bbox": [round_coordinate(x1), round_coordinate(y1), width, height],
            "area": round_coordinate(width * height),
            "iscrowd": 0,
        }


COMPONENT = DatasetFormat(
    name="coco",
    description='a .json file of {"images": [...], "annotations": [...], "categories": [...]}',
    parse_row=_parse_coco,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_coco,
    check_left_out=_check_texts,
    write_files=_write_coco,
    # Formats with a distinctive document precede those of plain rows.
    position=10,
)
