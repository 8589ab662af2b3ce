"""Annotations of images: questions of an import, and one record per image of an export.

With `--box-task detection`, an image yields one question that is answered by all its boxes. With
`--box-task grounding`, it yields one question per label that is answered by the boxes of this
label. Boxes are sorted by label, then from top to bottom and left to right.

With `--box-task points`, an image yields one question about the points of its objects, and with
`--box-task polygons` one that is answered by JSON of their outlines.

The answer for an image without objects is `none`, which is scored as no boxes; grounding skips such
an image.

A shape other than a box gives its enclosing box. If an object has none, such as a keypoint or a
crowd, or no outline for polygons, the question about its image does not ask for its class. The same
applies to a dropped box, except that a stray box without area counts only if no other box has its
class. If the class is unknown, the template does not list the classes, or no box is left, the image
is skipped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.files.bounded_files import find_existing
from finesight.ingest.formats.dataset_format import (
    BoxTask,
    ExportContext,
    ImportContext,
    ImportExample,
    InvalidOptionError,
    RowImages,
    as_list,
    make_text_part,
    read_prompt,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.boxes import (
    POLYGON_KEY,
    InvalidBoxError,
    StrayBoxError,
    find_bounds,
    translate_shape_errors,
)
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER, build_class_prompt
from finesight.samples.frames import BOX_DECIMALS, Box, BoxFrame, ImageSize
from finesight.samples.image_file import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_PIXELS,
    TRANSPOSED_ORIENTATIONS,
    CorruptImageError,
    open_image_header,
    read_exif_orientation,
)
from finesight.samples.sample import (
    MAX_ANSWERS,
    MAX_BOXES,
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    check_limit,
    join_text,
)

_DIGITS = re.compile(r"[0-9]{1,18}")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{[^{}]*\}?|\}")
"""A literal brace, written twice, a placeholder, or a brace without its other one."""


def parse_integer(text: str) -> int | None:
    """Parse an integer of up to 18 ASCII digits; return None for any other text."""
    return int(text) if _DIGITS.fullmatch(text) else None


def list_image_names(annotation_file: Path) -> list[str]:
    """Return the names of images that an annotation file without image name may belong to."""
    suffixes = sorted(IMAGE_SUFFIXES, key=lambda suffix: suffix != ".jpg")
    names = [annotation_file.with_suffix(suffix).name for suffix in suffixes]
    return names + [f"{annotation_file.stem}{suffix.upper()}" for suffix in suffixes]


NUM_PROBED_IMAGES = 500
"""Approximate number of images that are looked up to find the image folder."""


def find_image_folder(source: Path, names: Sequence[str]) -> Path:
    """Return the folder that contains the images of a document.

    Images are searched in the folder of the document, its parent, `images` in either, and other
    subfolders. The first folder that contains all images is used, else the folder that contains
    most, or of several ones that whose name occurs in the name of the document.

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
    name_matches = [folder for folder in best_folders if folder.name in source.stem]
    matches = name_matches if len(best_folders) > 1 else best_folders
    if len(matches) == 1:
        return matches[0]
    what = f"none of {len(names)} images is found, such as {names[0]!r}"
    remedy = "move the images to a folder `images` next to the document"
    if max_found:
        what = f"images of these names, such as {names[0]!r}, are in {len(best_folders)} folders"
        remedy = "add the folder to file_name, or move the document into the folder"
    folders = ", ".join(map(str, best_folders or tried_folders))
    raise UserError(what, where=str(source), expected=f"images in one of {folders}", remedy=remedy)


def _iter_candidate_folders(source: Path) -> Iterator[list[Path]]:
    """Yield groups of folders that may contain the images, the closest to the document first."""
    base_folders = (source.parent, source.parent.parent)
    yield from ([base_folder] for base_folder in base_folders)
    yield from ([base_folder / "images"] for base_folder in base_folders)
    for base_folder in base_folders:
        paths = [*sorted(base_folder.glob("*")), *sorted(base_folder.glob("images/*"))]
        yield [path for path in paths if os.path.isdir(path) and path.name != "images"]


UNKNOWN_LABEL = ""
"""Label of an object without a box whose class is unknown."""

NOTE_OMITTED_CLASSES = (
    "classes of objects without a valid box or polygon (not in the question about their image)"
)
NOTE_NO_POINTS = "objects without points (not in the answer)"
NOTE_UNLABELED = "keypoints of visibility 0 (not in the answer)"
NOTE_PARTS = "further parts of objects (each a polygon of its own)"
NOTE_HOLES = "holes in masks (filled)"
NOTE_OMITTED_BOXES = "boxes of these classes (not in the answer)"


class Outlines(NamedTuple):
    """Polygons around the parts of an object, in units of its format, and its number of holes.

    Those of a mask connect midpoints of pixel edges, so that they may be as small as a pixel.
    """

    polygons: Sequence[Sequence[Sequence[Any]]] = ()
    num_holes: int = 0
    is_mask: bool = False


NO_OUTLINES = Outlines()
BoolMask = NDArray[np.bool_]


def enclose_shape(
    kind: str,
    bounds: list[float] | None,
    context: ImportContext,
    outlines: Outlines = NO_OUTLINES,
) -> list[float] | None:
    """Return the enclosing box of a shape, None without area, and count the shape by its kind.

    With `--box-task polygons`, only shapes without outlines are counted, as skipped.
    """
    is_box = bounds is not None and bounds[0] < bounds[2] and bounds[1] < bounds[3]
    asks_polygons = context.box_task == "polygons"
    if not (asks_polygons and outlines.polygons):
        use = "converted to bounding boxes" if is_box and not asks_polygons else "skipped"
        context.shape_notes[f"{kind} ({use})"] += 1
    return bounds if is_box else None


MAX_COORDINATE = 1e9

MIN_OUTLINE_WIDTH_PX = 1e-3
"""Width below which an outline is a line, such as after its corners are moved to an image edge."""

MAX_MASK_EDGES = 200_000
"""Maximum number of pixel edges on the outlines of a mask."""


def decode_runs(counts: Sequence[int], size: ImageSize, order: Literal["C", "F"]) -> BoolMask:
    """Decode a mask of alternating run lengths, the background first.

    Args:
        size: Height and width.
        order: Order of the pixels: by rows (C), or by columns (F) as in COCO.
    """
    num_pixels = math.prod(size)
    # In Python integers: a wrong sum, such as of an overflow, would crash the process in `repeat`.
    is_valid = all(0 <= count <= num_pixels for count in counts) and sum(counts) == num_pixels
    if num_pixels > MAX_IMAGE_PIXELS or not is_valid:
        raise ValueError(f"runs of {sum(counts)} pixels in a mask of {size}")
    runs = np.array(counts, np.int64)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order=order)


def decode_counts(text: str) -> list[int]:
    """Decode the compressed run lengths of COCO: base 32, and differences to two runs before."""
    counts, value, shift = list[int](), 0, 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if shift > 50:
            raise ValueError(f"a run length of more than {shift} bits")
        if not code - 48 & 32:
            value -= (code - 48 & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def decode_brush(values: Sequence[int], size: ImageSize) -> BoolMask:
    """Decode the brush strokes of Label Studio: bits of runs of RGBA bytes, by rows."""
    bits = "".join(f"{value:08b}" for value in bytes(values))
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    num_values, num_bits = read(32), read(5) + 1
    if num_values != 4 * math.prod(size) or num_values > 4 * MAX_IMAGE_PIXELS:
        raise ValueError(f"{num_values} values in a mask of {size}")
    length_bits = [read(4) + 1 for _ in range(4)]
    flat, start = np.zeros(num_values, np.bool_), 0
    while start < num_values:
        is_run, length = read(1), read(length_bits[read(2)]) + 1
        for _ in range(1 if is_run else length):
            stop = start + (length if is_run else 1)
            flat[start:stop] = read(num_bits) > 0
            start = stop
    return flat.reshape(*size, 4)[..., 3]


def trace_mask(mask_HW: BoolMask, left: float = 0, top: float = 0) -> Outlines:
    """Return the outlines of the connected parts of a mask.

    An outline connects the midpoints of the pixel edges at the border of its part. It differs from
    the border by at most 0.36 pixels, at the corners of pixels.
    """
    padded = np.pad(mask_HW, 1).astype(np.int8)
    rows, columns = np.diff(padded[:, 1:-1], axis=0), np.diff(padded[1:-1], axis=1)
    # Start and direction (right, down, left, up) of each edge, with the part on its right.
    borders = (rows == 1, columns == -1, rows == -1, columns == 1)
    num_edges = sum(int(one.sum()) for one in borders)
    check_limit(num_edges, MAX_MASK_EDGES, "pixel edges on the outlines of a mask")
    steps, starts = ((1, 0), (0, 1), (-1, 0), (0, -1)), ((0, 0), (0, 0), (1, 0), (0, 1))
    edges = {
        (x + starts[turn][0], y + starts[turn][1], turn)
        for turn, border in enumerate(borders)
        for y, x in np.argwhere(border).tolist()
    }
    outlines: list[list[list[float]]] = []
    num_holes = 0
    while edges:
        edge = first = next(iter(edges))
        outline: list[list[float]] = []
        area = 0
        while edge != first or not outline:
            x, y, turn = edge
            dx, dy = steps[turn]
            outline.append([left + x + dx / 2, top + y + dy / 2])
            area += x * dy - y * dx
            x, y = x + dx, y + dy
            turns = ((turn + 1) % 4, turn, (turn - 1) % 4)  # right first: diagonals are separate
            edge = next((x, y, one) for one in turns if (x, y, one) in edges)
            edges.discard(edge)
        num_holes += area < 0
        if area > 0:
            outlines.append(outline)
    return Outlines(sorted(outlines), num_holes, is_mask=True)


def enclose_mask(mask_HW: BoolMask) -> Outlines:
    """Return two corners of the enclosing box of a mask as its outline, without `trace_mask`."""
    ys, xs = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    return Outlines([[(xs[0], ys[0]), (xs[-1] + 1, ys[-1] + 1)]]) if len(xs) else NO_OUTLINES


def simplify_outline(
    outline: Sequence[Sequence[Any]], image_size: ImageSize, frame: BoxFrame
) -> list[list[float]]:
    """Remove corners within half a unit of the simplified outline (Ramer-Douglas-Peucker).

    The unit is a thousandth of the image side or a pixel, whichever is smaller, so that no model
    family, which rounds to one of both, needs the removed corners.

    Raises:
        StrayBoxError: The outline has fewer than three corners.
        InvalidBoxError: The outline is not a list of pairs of numbers.
    """
    sides, expected = np.array(image_size[::-1], np.float64), "a polygon of three or more points"
    with translate_shape_errors(outline, expected):
        points_N2 = np.array([[float(x), float(y)] for x, y in outline])
        if not np.abs(points_N2).max() < MAX_COORDINATE:
            raise ValueError(f"{len(points_N2)} corners")
    if len(points_N2) < 3:
        what, remedy = f"the polygon {str(outline)[:80]}", "correct the shape, or remove it"
        raise StrayBoxError(what, expected=expected, remedy=remedy)
    height, width = frame.compute_size(*image_size)
    scaled = points_N2 * np.maximum(sides, 1000) / (width, height)
    ring = np.concatenate([scaled, scaled[:1]])
    farthest = int(np.argmax(np.hypot(*(ring - ring[0]).T)))
    kept, spans = {0, farthest}, [(0, farthest), (farthest, len(scaled))]
    while spans:
        start, stop = spans.pop()
        chord, inner = ring[stop] - ring[start], ring[start + 1 : stop] - ring[start]
        if not len(inner):
            continue
        along = np.clip(inner @ chord / max(chord @ chord, 1e-12), 0, 1)
        distances = np.hypot(*(inner - along[:, None] * chord).T)
        if distances.max() > 0.5:
            middle = start + 1 + int(np.argmax(distances))
            kept.add(middle)
            spans += [(start, middle), (middle, stop)]
    simplified: list[list[float]] = points_N2[sorted(kept)].tolist()
    return simplified if len(kept) > 2 else points_N2.tolist()


DETECTION_PROMPT = "Locate every object of these classes in the image: {labels}."
"""Default question for `--box-task detection`; `--prompt` overrides it."""

POLYGONS_PROMPT = "Outline every object of these classes in the image with polygons: {labels}."
"""Default question for `--box-task polygons`; `--prompt` overrides it."""

POINTS_PROMPT = "Point to each of these in the image: {labels}."
"""Default question for `--box-task points`; `--prompt` overrides it."""

GROUNDING_PROMPT = "Locate every {label} in the image."
"""Default question for `--box-task grounding`; `--prompt` overrides it."""

CAPTION_PROMPT = "Describe the image."
"""Default question about images with captions; `--prompt` overrides it."""

REASON_OBJECT_WITHOUT_BOX = (
    "images with objects without a valid box or polygon, for which the question would ask; to"
    " import them, remove these objects from the annotations, or give --box-task points for points"
)
REASON_UNLISTED_CLASSES = (
    "images with objects without a valid box or polygon, for which the question would ask; to"
    " leave out their classes, give --prompt with {labels}, or --box-task grounding"
)
REASON_NO_OBJECTS = "images without objects (skipped by --box-task grounding)"

MAX_CLASSES = 100_000
"""Maximum number of class names in a detection question, which is repeated for each image."""


@dataclass(frozen=True, slots=True)
class ObjectAnnotation:
    """An annotated object with its class name and box.

    Attributes:
        coordinates: Box in the frame of the format; None if the object has no box.
        outlines: Outlines of the object, for `--box-task polygons`.
        attributes: Further properties such as `difficult`, stored in the metadata of the sample.
        points: Points and keypoints of the object with their names, for `--box-task points`.
    """

    label: str
    coordinates: Sequence[object] | None
    outlines: Outlines = NO_OUTLINES
    attributes: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[tuple[str, Sequence[object]]] = ()


def _note_numbered_classes(class_names: Sequence[str], context: ImportContext) -> None:
    """Note classes that are named by numbers, such as those of phrases. Digits are names."""
    longest = max(class_names, key=len, default="")
    if len(longest) > 1 and all(map(str.isdecimal, class_names)):
        context.row_notes[f"images whose classes have numbers as names, such as {longest}"] += 1


def build_detection_examples(
    row: SourceRow,
    context: ImportContext,
    default_frame: BoxFrame,
    image: object,
    objects: Sequence[ObjectAnnotation],
    *,
    declared_size: tuple[object, object] = (None, None),
    meta: Record | None = None,
    default_prompt: str = DETECTION_PROMPT,
) -> list[ImportExample]:
    """Build the training examples of an annotated image.

    Images without objects yield none for grounding. Images with objects without a box yield none if
    the question cannot leave out their classes.

    Args:
        row: Row whose record has the names of all `classes` and `points` of the dataset, which
            questions list.
        declared_size: Height and width that the annotation file declares, each None if missing.
        default_prompt: Default question for `--box-task detection`.

    Raises:
        InvalidOptionError: The prompt template is invalid.
        InvalidBoxError: A box is outside the image, or the image has another size than declared.
    """
    class_names = row.record["classes"]
    if context.box_task == "points":
        class_names, default_prompt = row.record.get("points", ()), POINTS_PROMPT
        if not class_names:
            raise InvalidOptionError(
                f"no points in the annotations of {row.location}",
                where="--box-task points",
                expected="points or keypoints, with names",
                remedy="omit the option, or annotate points",
            )
        context.row_notes[NOTE_NO_POINTS] += sum(not one.points for one in objects)
        objects = [
            ObjectAnnotation(*point, attributes=one.attributes)
            for one in objects
            for point in one.points
        ]
    _note_numbered_classes(class_names, context)
    check_limit(len(objects), MAX_BOXES, "boxes")
    images = RowImages(context)
    image_part = images.add_image(image)
    check_declared_size(declared_size, images.paths[-1], context)
    if context.box_task == "polygons":
        default_prompt = POLYGONS_PROMPT
        outlines = [one.outlines for one in objects]
        context.row_notes[NOTE_PARTS] += sum(max(0, len(one.polygons) - 1) for one in outlines)
        context.row_notes[NOTE_HOLES] += sum(one.num_holes for one in outlines)
    located, omitted = _locate_objects(objects, images, context, default_frame)
    kept = [one for one in located if one.parts[0].label not in omitted]
    template = default_prompt if context.prompt is None else context.prompt
    has_class_list = "{labels}" in template
    if omitted and (not kept or UNKNOWN_LABEL in omitted):
        context.skipped_rows[REASON_OBJECT_WITHOUT_BOX] += 1
        return []
    if omitted and context.box_task != "grounding" and not has_class_list:
        context.skipped_rows[REASON_UNLISTED_CLASSES] += 1
        return []
    context.row_notes[NOTE_OMITTED_CLASSES] += len(omitted.intersection(class_names))
    context.row_notes[NOTE_OMITTED_BOXES] += len(located) - len(kept)
    if context.box_task != "grounding":
        if len(class_names) > MAX_CLASSES:
            raise InvalidOptionError(
                f"a question with {len(class_names):,} classes",
                where=f"--box-task {context.box_task}",
                expected=f"at most {MAX_CLASSES:,}",
                remedy="use --box-task grounding, which asks for one class per question",
            )
        names = [name for name in dict.fromkeys(class_names) if name not in omitted]
        question = format_prompt(template, template, {"labels": ", ".join(names)})
        full_meta = {**(meta or {}), **({"classes": names} if has_class_list else {})}
        return [_build_example(row.id, [image_part, *question], kept, full_meta, context.box_task)]
    boxes_by_label: defaultdict[str, list[LocatedObject]] = defaultdict(list)
    for one in kept:
        boxes_by_label[str(one.parts[0].label)].append(one)
    context.skipped_rows.update([REASON_NO_OBJECTS] if not boxes_by_label else [])
    return [
        _build_example(
            f"{row.id}-{label}",
            [image_part, *format_prompt(context.prompt, GROUNDING_PROMPT, {"label": label})],
            boxes,
            meta or {},
            context.box_task,
        )
        for label, boxes in boxes_by_label.items()
    ]


class LocatedObject(NamedTuple):
    """The box or point of an object, or the corners of one of its outlines."""

    parts: Sequence[BoxPart]
    attributes: Mapping[str, Any]

    def get_order(self) -> tuple[Any, ...]:
        """Return the sort key: label, then upper left and lower right corner."""
        corners = [xyxy[n : n + 2] for xyxy in (part.xyxy for part in self.parts) for n in (0, 2)]
        x1, y1, x2, y2 = find_bounds(corners, self.parts)
        return str(self.parts[0].label), y1, x1, y2, x2


def _locate_objects(
    objects: Sequence[ObjectAnnotation],
    images: RowImages,
    context: ImportContext,
    frame: BoxFrame,
) -> tuple[list[LocatedObject], set[str]]:
    """Return the boxes or outlines of objects, and the labels of objects without one.

    The label of a stray box counts only if no other box has it.
    """
    located: list[LocatedObject] = []
    omitted, stray = set[str](), set[str]()
    for obj in objects:
        regions: Sequence[Sequence[Any]] = []
        if obj.coordinates is not None:
            regions = [[obj.coordinates]]
        if context.box_task == "polygons":
            outlines: list[list[list[float]]] = []
            regions = outlines
            for polygon in obj.outlines.polygons:
                size = context.images.image_size(images.paths[-1])
                resolved = context.resolve_frame(frame)
                try:
                    outlines.append(simplify_outline(polygon, size, resolved))
                except StrayBoxError as error:
                    images.drop_box(error)
                    stray.add(obj.label)
        omitted.update([] if regions or obj.label in stray else [obj.label])
        for region in regions:
            parts: list[BoxPart] = []
            num_notes = len(context.invalid_boxes)
            for coordinates in region:
                part = images.create_valid_box(coordinates, obj.label, frame)
                if not isinstance(part, BoxPart):
                    (stray if isinstance(part, StrayBoxError) else omitted).add(obj.label)
                    break
                parts.append(part)
            else:
                problem = _check_outline(parts, obj, context, frame)
                if problem is None:
                    located.append(LocatedObject(parts, obj.attributes))
                    continue
                del context.invalid_boxes[num_notes:]  # of moved corners
                images.drop_box(problem)
                (stray if isinstance(problem, StrayBoxError) else omitted).add(obj.label)
    located.sort(key=LocatedObject.get_order)
    return located, omitted | (stray - {str(one.parts[0].label) for one in located})


def _check_outline(
    parts: Sequence[BoxPart],
    obj: ObjectAnnotation,
    context: ImportContext,
    frame: BoxFrame,
) -> InvalidBoxError | None:
    """Return the error of an outline without area, or that is probably in fractions of the image.

    The pixels of a mask are no fractions, even if it has a single one.
    """
    if context.box_task != "polygons":
        return None
    corners_N2 = np.array([part.xyxy[:2] for part in parts])
    is_pixel = context.resolve_frame(frame).base == "image"
    is_fraction = is_pixel and corners_N2.max() <= 1 and bool((corners_N2 % 1).any())
    what = f"the polygon {str(corners_N2.tolist())[:80]} in pixels"
    remedy = "correct the shape, or remove it"
    if is_fraction and not obj.outlines.is_mask:
        what, expected = f"{what} is smaller than a pixel", "a polygon in pixels"
        remedy = f"if it is in fractions of the image size, give --box-units 1; otherwise {remedy}"
        return InvalidBoxError(what, expected=expected, remedy=remedy)
    if np.linalg.matrix_rank(corners_N2 - corners_N2[0], tol=MIN_OUTLINE_WIDTH_PX) > 1:
        return None
    return StrayBoxError(f"{what} has no area", expected="a polygon in the image", remedy=remedy)


def build_text_example(
    sample_id: str,
    image: object,
    answers: Sequence[str],
    classes: Sequence[str],
    context: ImportContext,
    meta: Record | None = None,
    default_prompt: str = CAPTION_PROMPT,
) -> ImportExample:
    """Build the example of an image with texts, each of which is a correct answer.

    Args:
        classes: Class names of the full dataset if the answers are classes, else empty. They
            replace the default question.
    """
    check_limit(len(answers), MAX_ANSWERS, "answers")
    template = build_class_prompt(len(classes)) if classes else default_prompt
    part = RowImages(context).add_image(image)
    if classes or context.prompt is None:
        question = format_prompt(context.prompt, template, {"labels": ", ".join(classes)})
    else:
        text = read_prompt(context.prompt)
        question = [make_text_part(text)] if text else []
    user = Message(role="user", content=(part, *question))
    parts = tuple((make_text_part(answer),) for answer in answers)
    return ImportExample(sample_id, (user,), parts, meta=meta or {})


def format_prompt(
    prompt: str | None, default_template: str, values: Mapping[str, str]
) -> list[TextPart]:
    """Fill in the placeholders of a prompt template.

    Args:
        prompt: Template from the user, None for the default. "" yields no text part.
        values: Value per placeholder. Doubled braces in the template are literal braces.

    Raises:
        InvalidOptionError: The template contains unknown placeholders, or lacks {label}, which
            would yield the same question for every label.
        UserError: There are no labels.
    """
    template, problem = default_template if prompt is None else prompt, ""
    fields = set(_PLACEHOLDER.findall(template)) - {"{{", "}}"}
    unknown = sorted(fields - {f"{{{name}}}" for name in values})
    if unknown:
        problem = f"{unknown[0]} is an unknown placeholder"
    elif "{labels}" in fields and not values["labels"]:
        raise UserError(
            "no object of the source has a class name",
            expected="objects with labels, or a --prompt without {labels}",
            remedy="check the labels, or set a question with --prompt",
        )
    elif "label" in values and "{label}" not in fields:
        problem = "it yields the same question for every label"
    if problem:
        raise InvalidOptionError(
            f"the template {template[:80]!r}: {problem}",
            where="--prompt",
            expected=f"text with {' or '.join(f'{{{name}}}' for name in values)}",
            remedy="correct the template; {{ and }} are literal braces",
        )
    text = template.format(**values)
    return [make_text_part(text)] if text else []


def check_declared_size(
    declared: tuple[object, object],
    image_path: Path,
    context: ImportContext,
    others: Set[tuple[float, float]] = frozenset(),
) -> None:
    """Raise InvalidBoxError if an image has another size than its annotation file declares.

    The boxes would then be in another coordinate frame: before EXIF rotation, or of a resized
    image. The sizes `others` are valid, too.
    """
    try:
        actual = context.images.image_size(image_path)
    except CorruptImageError:
        if context.lenient:
            return
        raise
    try:
        height, width = (float(str(side)) for side in declared)
    except ValueError:
        return
    # Some tools write 0 for an unknown size.
    if (height, width) in {actual, *others} or not height * width > 0:
        return
    message = f"the boxes refer to an image of {width:g} x {height:g} pixels, the image has "
    message += f"{actual[1]} x {actual[0]}"
    with open_image_header(image_path) as image:
        is_transposed = read_exif_orientation(image) in TRANSPOSED_ORIENTATIONS
    expected = "the annotated image in its original size"
    remedy = "use the annotated images instead of resized or cropped copies"
    if (width, height) == actual and is_transposed:
        message += " after EXIF rotation: it was annotated before rotation"
        expected = "boxes in the image after EXIF rotation"
        remedy = "remove the EXIF orientation from the images, so that they match the annotations,"
        remedy += " or rotate the boxes"
    raise InvalidBoxError(message, where=str(image_path), expected=expected, remedy=remedy)


def _build_example(
    sample_id: str,
    question: Sequence[ContentPart],
    located: Sequence[LocatedObject],
    meta: Record,
    box_task: BoxTask,
) -> ImportExample:
    answer: tuple[ContentPart, ...] = (TextPart(text=NO_OBJECTS_ANSWER),)
    if located:
        corners = [one.parts for one in located]
        is_json = box_task == "polygons"
        answer = _write_polygons(corners) if is_json else tuple(itertools.chain(*corners))
    attributes = [dict(one.attributes) for one in located]
    full_meta = {**meta, **({"boxes": attributes} if any(attributes) else {})}
    return ImportExample(
        sample_id, (Message(role="user", content=tuple(question)),), (answer,), meta=full_meta
    )


def _write_polygons(polygons: Sequence[Sequence[BoxPart]]) -> tuple[ContentPart, ...]:
    """Return JSON of polygons as texts, with a point instead of each corner."""
    content: list[ContentPart] = []
    text = "["
    for corners in polygons:
        text += f'{{"{POLYGON_KEY}": ['
        for corner in corners:
            content += [TextPart(text=text), corner]
            text = ", "
        label = json.dumps(corners[0].label, ensure_ascii=False)
        text = make_text_part(f'], "label": {label}}}, ').text
    return *content, TextPart(text=f"{text[:-2]}]")


LOST_QUESTIONS = "questions, which an import regenerates from --prompt and --box-task"

LOST_WHITESPACE = "white space around answers"

REGENERATED_META_KEYS = frozenset({"classes"})
"""Metadata keys that an import generates again, so that an export does not lose them."""


@dataclass(frozen=True, slots=True)
class ExportBox:
    """A box to export, with its label, its corners in pixels and its metadata."""

    label: str
    xyxy: Box
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class ImageRecord:
    """An image with the answers of all its samples, as texts or as boxes."""

    image_path: Path
    answers: list[str] = field(default_factory=list)
    boxes: list[ExportBox] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def merge_boxes(self, boxes: Sequence[ExportBox]) -> None:
        """Add the boxes of a sample, except those that the image already has."""
        existing = list(self.boxes)
        for box in boxes:
            if box in existing:
                existing.remove(box)
            else:
                self.boxes.append(box)


def group_by_image(
    samples: Sequence[LocatedSample],
    context: ExportContext,
    meta_keys: Set[str],
    *,
    is_detection: bool | None = None,
) -> tuple[list[ImageRecord], bool]:
    """Group the boxes or texts of all samples by image, in order of appearance.

    Args:
        is_detection: Whether to group boxes, or texts with references. By default, boxes are
            grouped if there are any.

    Returns:
        A record per image, and whether boxes were grouped.
    """
    if is_detection is None:
        answers = (located_sample.sample.messages[-1].content for located_sample in samples)
        is_detection = any(isinstance(part, BoxPart) for answer in answers for part in answer)
    records: dict[Path, ImageRecord] = {}
    for located_sample in samples:
        sample, lost = located_sample.sample, context.lost_counts
        path = located_sample.resolve_path(_get_single_image(sample))
        record = records.setdefault(path, ImageRecord(path))
        record.meta.update(sample.meta)
        lost[LOST_QUESTIONS] += 1
        lost["system prompts"] += sample.messages[0].role == "system"
        lost["rejected answers"] += bool(sample.rejected)
        lost["labels of answers"] += sample.label is not None
        lost["tools"] += bool(sample.tools)
        other_keys = sample.meta.keys() - meta_keys - REGENERATED_META_KEYS
        lost.update(f"the key {key} of meta" for key in other_keys)
        if is_detection:
            record.merge_boxes(list(_iter_boxes(sample)))
            lost["references"] += bool(sample.references)
        else:
            texts = [_get_answer_text(sample), *sample.references]
            record.answers += [text for text in texts if text not in record.answers]
    return list(records.values()), is_detection


def collect_classes(records: Sequence[ImageRecord]) -> list[str]:
    """Return all class names: those of the imported dataset in order, then new ones sorted."""
    declared_names = [name for record in records for name in record.meta.get("classes", ())]
    used_names = sorted({box.label for record in records for box in record.boxes})
    return list(dict.fromkeys([*declared_names, *used_names]))


def require_inside_output(path: Path, context: ExportContext, format_name: str) -> str:
    """Return the path of an image relative to the output folder."""
    name = context.image_names[path]
    if name.startswith("../") or Path(name).is_absolute():
        raise UserError(
            f"the image is outside the output folder, where {format_name} cannot reference it",
            where=str(path),
            expected="images inside the output folder, next to their labels",
            remedy="give --copy-images",
        )
    return name


def assign_text_file(name: str, used_names: set[str]) -> str:
    """Reserve the text file of an image, and return its name."""
    text = str(Path(name).with_suffix(".txt"))
    if text in used_names:
        raise UserError(
            f"two images with the text file {text}",
            expected="names with different stems",
            remedy="rename one of the two, or export as coco",
        )
    used_names.add(text)
    return text


def round_coordinate(value: float) -> int | float:
    """Round a coordinate to `BOX_DECIMALS`, and convert a whole number to an integer."""
    rounded = round(value, BOX_DECIMALS)
    return int(rounded) if rounded == int(rounded) else rounded


def _build_export_error(sample: Sample, what: str, expected: str) -> UserError:
    remedy = "export these samples in a conversation format, or remove them"
    return UserError(what, where=f"sample {sample.id}", expected=expected, remedy=remedy)


def _get_single_image(sample: Sample) -> str:
    turns = [message.role for message in sample.messages if message.role != "system"]
    images = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    if turns != ["user", "assistant"] or len(images) != 1:
        what = f"{len(turns)} turns about {len(images)} images"
        raise _build_export_error(sample, what, "one question about one image, and its answer")
    return images[0]


def _iter_boxes(sample: Sample) -> Iterator[ExportBox]:
    content = sample.messages[-1].content
    parts = [part for part in content if part.type != "text" or part.text.strip()]
    stored = as_list(sample.meta.get("boxes"))
    known: list[Any] = stored if len(stored) == len(parts) else [{}] * len(parts)
    if parts == [TextPart(text=NO_OBJECTS_ANSWER)]:
        return
    for part, attributes in zip(parts, known, strict=True):
        if not isinstance(part, BoxPart) or part.is_point or not (part.label or "").strip():
            what = f"the answer contains {str(part)[:80]}"
            expected = f"only boxes with labels, or {NO_OBJECTS_ANSWER!r}"
            raise _build_export_error(sample, what, expected)
        attributes = attributes if isinstance(attributes, dict) else {}
        yield ExportBox(str(part.label), part.xyxy, attributes)


def _get_answer_text(sample: Sample) -> str:
    parts = sample.messages[-1].content
    if not all(isinstance(part, TextPart) for part in parts):
        raise UserError(
            "a mix of answers with and without boxes",
            where=f"sample {sample.id}",
            expected="only text answers",
            remedy="export the samples with boxes separately",
        )
    return join_text(parts)
