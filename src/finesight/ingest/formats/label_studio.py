"""Label Studio: a JSON list of tasks with annotations or predictions, or JSON-MIN.

[{"data": {"image": "/data/local-files/?d=images/a.jpg"}, "annotations": [{"result": [
  {"id": "1", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
   "original_width": 640, "original_height": 480,
   "value": {"x": 10, "y": 20, "width": 30, "height": 5, "rectanglelabels": ["dog"]}}]}]}]

Boxes are in percent of the image. A dataset with regions becomes questions about boxes; the label
of a region with text is its text, and its class is stored in the metadata. Other datasets become
questions about the whole image: a class, a text, or several controls as a JSON object.

A text in the data of the tasks that the annotator saw as the question, such as `question`, is the
question of the sample, to which `--prompt` is appended.

The server addresses of images are searched as paths in the folder of the file, see
`find_image_folder`, without leading folders if necessary, and without the random prefix of uploads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

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
    DETECTION_PROMPT,
    UNKNOWN_LABEL,
    ExportBox,
    ImageRecord,
    ObjectAnnotation,
    Outlines,
    build_detection_examples,
    build_text_example,
    decode_brush,
    enclose_mask,
    enclose_shape,
    find_image_folder,
    group_by_image,
    require_inside_output,
    trace_mask,
)
from finesight.ingest.formats.json_annotations import read_document
from finesight.ingest.formats.row_keys import count_keys
from finesight.ingest.formats.xml_annotations import parse_xml
from finesight.ingest.row_reader import Record, RowReader, SourceRow, rows_from_items
from finesight.samples.boxes import (
    InvalidBoxError,
    find_bounds,
    rotate_rectangle,
    translate_shape_errors,
)
from finesight.samples.frames import Box, ImageSize, get_frame
from finesight.samples.image_file import is_image_value
from finesight.samples.sample import LocatedSample

SPOTTING_PROMPT = "Locate and read every text in the image."
"""Default question about regions with texts; `--prompt` overrides it."""

FIELDS_PROMPT = "Read these fields of the image as JSON: {labels}."
"""Default question about several controls; `--prompt` overrides it."""

LOCAL_FILES_PATH, UPLOAD_PATH = "/data/local-files/", "/data/upload/"
BOX_FRAME = get_frame("xywh", "1")
_RESULT_USED_KEYS = (
    "id",
    "type",
    "from_name",
    "to_name",
    "original_width",
    "original_height",
    "value",
    "image_rotation",
)
_VALUE_USED_KEYS = (
    "x",
    "y",
    "width",
    "height",
    "rotation",
    "points",
    "rectanglelabels",
    "polygonlabels",
    "labels",
    "choices",
    "text",
    "number",
    "rating",
    "datetime",
    "closed",
    "radiusX",
    "radiusY",
    "ellipselabels",
    "keypointlabels",
    "brushlabels",
    "rle",
    "format",
)
MODEL_VERSION = "finesight"

NOTE_PREDICTIONS = "tasks without annotations (predictions are used)"
NOTE_SEVERAL = "tasks with several annotations (the ground truth or the newest is used)"
NOTE_NO_TEXT = "regions without text (skipped)"
NOTE_WHOLE_IMAGE = "answers about the whole image, next to regions (ignored)"
REASON_CANCELLED = "tasks that their annotators skipped"
REASON_UNLABELED = "tasks without annotations"
REASON_NO_ANSWER = "tasks whose annotation is empty"

_MIN_KEYS = frozenset({"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"})
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
_QUESTION_KEY = re.compile(
    r"(?:.*[\W_])?(?:(?:question|prompt|instruction)s?|query|queries|问题|提问|指令)"
    r"(?:[\W_]*(?:text|content|en|zh|cn|[0-9]+))?"
)
"""Name of a text that the annotator saw as the question, in lower case with underscores."""

_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_QUESTION = re.compile(r"(?s)\s*(?![a-z]+://)(?:\S+\s.*\?|.*？)\s*")
_SENTENCE = re.compile(r"(?s)\s*\S+\s+\S.*|.*[^\W\da-zA-Z_]{4}.*")

ResultSource = Literal["annotations", "predictions"]


@dataclass(frozen=True, slots=True)
class LabeledTask:
    """A task with the results of its selected annotation.

    Attributes:
        location: Location of the task for messages.
        other_keys: Number of unused keys of the task, its data and its annotation.
        texts: Texts in the data of the task, without its image, by their keys.
        skip_reason: Reason why the task has no results, "" otherwise.
    """

    location: str
    reference: str
    results: tuple[Record, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    other_keys: Counter[str] = field(default_factory=Counter)
    skip_reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProjectLabels:
    """Labels of all tasks: classes of regions, points and choices, sorted, and control names.

    Attributes:
        has_regions: Whether any task has a region.
        text_classes: Classes of regions with texts; "" of regions without class.
        controls: Names of the controls whose answers are about the whole image.
        questions: Keys of texts that annotators may have seen as the question.
    """

    classes: tuple[str, ...]
    points: tuple[str, ...]
    choices: tuple[str, ...]
    controls: tuple[str, ...]
    has_regions: bool
    text_classes: frozenset[str]
    questions: tuple[str, ...] = ()


def open_tasks(
    source: Path, *, results_from: ResultSource = "annotations"
) -> tuple[RowReader, str] | None:
    """Open a JSON export of Label Studio as rows, one per task.

    Args:
        results_from: Use annotations, and predictions of tasks without any; or predictions only."""
    tasks = _read_tasks(source, results_from)
    if tasks is None:
        return None
    project = _collect_labels(tasks)
    references = [task.reference for task in tasks]
    paths = _find_images(source, LOCAL_FILES_PATH, references)
    paths |= _find_images(source, UPLOAD_PATH, references)

    def make_row(row_number: int, task: LabeledTask) -> SourceRow:
        image = paths.get(task.reference, task.reference)
        stem = "data-url" if image.startswith("data:") else PurePosixPath(image).stem
        record = {"id": stem, "image": image, "task": task, "project": project}
        record |= {"classes": project.classes, "points": project.points}
        return SourceRow(row_number, task.location, record, source.stem)

    found = f"answers of {', '.join(project.controls)}"
    if project.has_regions:
        found = f"regions of {format_count(len(project.classes), 'class')}"
    return rows_from_items(tasks, make_row), f"tasks with {results_from}: Label Studio, {found}"


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a task."""
    task, project = row.record["task"], row.record["project"]
    if task.skip_reason:
        context.skipped_rows[task.skip_reason] += 1
        return []
    context.other_keys.update(task.other_keys)
    count_keys(task.results, _RESULT_USED_KEYS, "results", context.other_keys)
    values = (one["value"] for one in task.results if isinstance(one.get("value"), dict))
    count_keys(values, _VALUE_USED_KEYS, "results", context.other_keys)
    notes = context.row_notes
    notes.update(task.notes)
    question = _select_question(row, context)
    for key, text in task.texts.items():
        if text != question:
            _count_text(key, text, context)
    if not project.has_regions:
        return _parse_answers(row, question, context)
    targets = {str(result.get("to_name")) for result in task.results if "original_width" in result}
    if len(targets) > 1:
        raise UserError(
            f"regions of {len(targets)} images: {', '.join(sorted(targets))[:80]}",
            where=row.location,
            expected="one image per task",
            remedy="export one task per image, or remove the task",
        )
    sizes = [(one.get("original_height"), one.get("original_width")) for one in task.results]
    declared = {size for size in sizes if all(isinstance(side, int) for side in size)}
    notes[NOTE_WHOLE_IMAGE] += len(_merge_answers(task.results))
    regions = _merge_regions(task.results)
    objects = [one for region in regions for one in _parse_region(region, context, project)]
    if question and context.box_task == "grounding":
        raise InvalidOptionError(
            f"the tasks have a question of their own, such as {question[:60]!r}",
            where="--box-task grounding",
            expected="tasks without a question, which get one per label",
            remedy="remove the option, or the question from the data of the tasks",
        )
    with _ask(question.replace("{", "{{").replace("}", "}}"), context):
        return build_detection_examples(
            row,
            context,
            BOX_FRAME,
            row.record["image"],
            objects,
            declared_size=declared.pop() if len(declared) == 1 else (None, None),
            default_prompt=SPOTTING_PROMPT if project.text_classes else DETECTION_PROMPT,
        )


def _select_question(row: SourceRow, context: ImportContext) -> str:
    """Return the question in the data of a task, "" for none.

    Raises:
        InvalidOptionError: Several texts may be the question, and the user gives no other.
        UserError: The task has no question, in contrast to others.
    """
    task = row.record["task"]
    keys = row.record["project"].questions
    has_prompt = context.prompt is not None
    if len(keys) > 1:
        if has_prompt:
            return ""
        raise InvalidOptionError(
            f"the tasks have several texts that may be the question: {', '.join(keys)}"[:200],
            where=row.location,
            expected="one of them, such as question",
            remedy="give the question of all tasks with --prompt, or remove the other texts from"
            " the data of the tasks",
        )
    question = ""
    for key in keys:
        question = task.texts.get(key, "")
    if keys and not question and not has_prompt:
        raise UserError(
            f"no text under {keys[0]!r}, in contrast to other tasks",
            expected="the question that the annotator saw",
            remedy="write the question, remove the task, or give one for all with"
            " --replace-prompts",
        )
    return question


def _count_text(key: str, text: str, context: ImportContext) -> None:
    """Count a text of a task that is not its question; sentences may change the answer."""
    if _SENTENCE.fullmatch(text):
        context.row_notes[f"texts {key!r} of tasks (not in the question)"] += 1
    else:
        count_keys([{key: text}], (), "tasks", context.other_keys)


@contextlib.contextmanager
def _ask(question: str, context: ImportContext) -> Iterator[None]:
    """Put the question of a task before the text of `--prompt`."""
    prompt = context.prompt
    if question:
        context.prompt = f"{question}\n{prompt}" if prompt else question
    try:
        yield
    finally:
        context.prompt = prompt


def write_files(
    samples: Sequence[LocatedSample],
    context: ExportContext,
    *,
    results_to: ResultSource = "annotations",
) -> Files:
    """Write the tasks and the labeling configuration of a project."""
    records, is_detection = group_by_image(samples, context, {"boxes"})
    declared = {name for record in records for name in record.meta.get("classes", ())}
    has_choices = all(answer in declared for record in records for answer in record.answers)
    tasks = []
    for record in records:
        path = require_inside_output(record.image_path, context, "Label Studio")
        results: list[Record] = []
        if is_detection:
            size = context.image_size(record.image_path)
            for number, box in enumerate(record.boxes, start=1):
                others = box.attributes.keys() - {"class"}
                context.lost_counts.update(f"the attribute {name} of boxes" for name in others)
                names = _get_class_and_text(box)
                results += build_region_results(f"box-{number}", box.xyxy, size, *names)
        else:
            results = [build_answer_result(record.answers, is_choice=has_choices)]
        labels: Record = {"result": results}
        if results_to == "predictions":
            labels["model_version"] = MODEL_VERSION
        reference = f"{LOCAL_FILES_PATH}?d={quote(path)}"
        tasks.append({"data": {"image": reference}, results_to: [labels]})
    config = _build_label_config(records, is_detection=is_detection, has_choices=has_choices)
    context.notes.append(
        "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and with"
        " LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT set to this folder"
    )
    yield "tasks.json", (json.dumps(tasks, ensure_ascii=False, indent=1) + "\n").encode()
    yield "label_config.xml", config


def build_region_results(
    region_id: str,
    xyxy: Box,
    image_size: ImageSize,
    label: str,
    text: str | None = None,
    controls: tuple[str, str, str] = ("label", "text", "image"),
) -> list[Record]:
    """Build the results of a box or point with its label, and perhaps a text.

    Args:
        controls: Names of the controls of rectangles and texts, and of the image.
    """
    height, width = image_size
    x1, y1, x2, y2 = xyxy
    kind, geometry = "keypointlabels", {"x": 100 * x1 / width, "y": 100 * y1 / height}
    if (x1, y1) == (x2, y2):
        geometry["width"] = 0.5  # of the dot
    else:
        kind = "rectanglelabels"
        geometry["width"], geometry["height"] = 100 * (x2 - x1) / width, 100 * (y2 - y1) / height
        geometry["rotation"] = 0
    common: Record = {"id": region_id, "to_name": controls[2]}
    common |= {"original_width": width, "original_height": height, "image_rotation": 0}
    parts = [(controls[0], kind, {kind: [label]})]
    parts += [] if text is None else [(controls[1], "textarea", {"text": [text]})]
    return [
        {**common, "from_name": name, "type": one, "value": {**geometry, **value}}
        for name, one, value in parts
    ]


def build_answer_result(
    answers: Sequence[str], *, is_choice: bool, controls: tuple[str, str] = ("answer", "image")
) -> Record:
    """Build the result of an answer about the whole image: choices or texts."""
    kind, key = ("choices", "choices") if is_choice else ("textarea", "text")
    names = {"from_name": controls[0], "to_name": controls[1]}
    return {"id": controls[0], **names, "type": kind, "value": {key: list(answers)}}


@dataclass(frozen=True, slots=True)
class LabelControl:
    """A control of a labeling configuration, and the image that it labels.

    Attributes:
        data_key: Key of the image in the data of a task.
        labels: Class names of rectangles, points or choices.
        text_name: Name of the control for the texts of rectangles, None without one.
        is_multiple: Whether several choices can be selected.
    """

    kind: Literal["boxes", "points", "choices", "text"]
    name: str
    image_name: str
    data_key: str
    labels: tuple[str, ...] = ()
    text_name: str | None = None
    is_multiple: bool = False


_CONTROL_KINDS: dict[str, Literal["boxes", "points", "choices", "text"]] = {
    "RectangleLabels": "boxes",
    "KeyPointLabels": "points",
    "Choices": "choices",
    "TextArea": "text",
}


def parse_label_config(config: str) -> list[LabelControl]:
    """Parse the controls of a labeling configuration (XML) that label images.

    These are RectangleLabels, KeyPointLabels, Choices and TextArea. Other tags are ignored.
    """
    view = parse_xml(config, "a labeling configuration of Label Studio")
    data_keys = {
        image.get("name", ""): image.get("value", "").removeprefix("$")
        for image in view.iter("Image")
    }
    found = [one for one in view.iter() if one.tag in _CONTROL_KINDS]
    found = [one for one in found if one.get("toName", "") in data_keys]
    regional = [one for one in found if one.get("perRegion", "false").lower() == "true"]
    text_names = {one.get("toName"): one.get("name") for one in regional if one.tag == "TextArea"}
    return [
        LabelControl(
            kind=_CONTROL_KINDS[control.tag],
            name=control.get("name", ""),
            image_name=(target := control.get("toName", "")),
            data_key=data_keys[target],
            labels=tuple(
                one.get("alias", one.get("value", ""))
                for one in control
                if one.tag in ("Label", "Choice")
            ),
            text_name=text_names.get(target) if control.tag == "RectangleLabels" else None,
            is_multiple=control.get("choice", "").startswith("multiple"),
        )
        for control in found
        if control not in regional
    ]


def _read_tasks(source: Path, results_from: ResultSource) -> list[LabeledTask] | None:
    """Return the tasks of an export, or None if the file has another format."""
    records = read_document(source, b'"data"', b'"annotation_id"', opening=b"[")
    if not records or not all(isinstance(record, dict) for record in records):
        return None
    if all({"annotation_id", "annotator"} <= record.keys() for record in records):
        questions = _find_min_questions(records)
        tasks = [_expand_min(record, questions) for record in records]
    elif all(isinstance(record.get("data"), dict) for record in records) and any(
        isinstance(record.get(key), list) for record in records for key in _RESULT_KEYS
    ):
        tasks = records
    else:
        return None
    return [
        _select_results(number, task, source, results_from)
        for number, task in enumerate(tasks, start=1)
    ]


_RESULT_KEYS = ("annotations", "completions", "predictions")
_ANNOTATION_USED_KEYS = ("result", "ground_truth", "created_at", "updated_at")


def _select_results(
    number: int, task: Record, source: Path, results_from: ResultSource
) -> LabeledTask:
    """Select the annotation or prediction of a task."""
    location = f"task {task.get('id', number)}"
    reference = _get_image_reference(task["data"], f"{source}, {location}")
    data = {key: value for key, value in task["data"].items() if value != reference}
    annotations, predictions = (
        [one for one in as_list(value) if isinstance(one, dict)]
        for value in (task.get("annotations") or task.get("completions"), task.get("predictions"))
    )
    is_prediction = results_from == "predictions" or not annotations
    candidates = predictions if is_prediction else annotations
    valid = [one for one in candidates if not (one.get("was_cancelled") or one.get("skipped"))]
    if not valid:
        reason = REASON_CANCELLED if candidates else REASON_UNLABELED
        return LabeledTask(location, reference, skip_reason=reason)
    valid.sort(key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""), reverse=True)
    selected = max(valid, key=lambda one: bool(one.get("ground_truth")))
    notes = []
    if len(valid) > 1:
        notes.append(NOTE_SEVERAL)
    if is_prediction and results_from == "annotations":
        notes.append(NOTE_PREDICTIONS)
    results = tuple(one for one in as_list(selected.get("result")) if isinstance(one, dict))
    texts = {key: value for key, value in data.items() if _is_text(value)}
    other_keys: Counter[str] = Counter()
    count_keys([data], texts, "tasks", other_keys)
    count_keys([task], ("id", "data", *_RESULT_KEYS), "tasks", other_keys)
    count_keys([*annotations, *predictions], _ANNOTATION_USED_KEYS, "annotations", other_keys)
    return LabeledTask(location, reference, results, texts, other_keys, notes=tuple(notes))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != "" and not _is_image_reference(value)


def _find_questions(
    objects: Sequence[Mapping[str, Any]], *, by_name: bool = False
) -> tuple[str, ...]:
    """Return the keys of the texts that are questions by their name, or mostly by their end.

    Args:
        by_name: Only the names decide, because texts may also be answers.
    """
    num_texts: Counter[str] = Counter()
    num_questions: Counter[str] = Counter()
    for one in objects:
        for key, value in one.items():
            if _is_text(value):
                num_texts[key] += 1
                num_questions[key] += _QUESTION.fullmatch(value) is not None
    found = []
    for key, count in num_texts.items():
        name = _CAPITAL.sub("_", key).lower()
        is_question = 2 * num_questions[key] > count and not by_name
        if is_question or _QUESTION_KEY.fullmatch(name):
            found.append(key)
    return tuple(found)


def _find_min_questions(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the keys of questions in JSON-MIN; none if there are no other answers."""
    questions = _find_questions(records, by_name=True)
    for name in {name for one in records for name in one} - _MIN_KEYS - {*questions}:
        values = [record.get(name) for record in records]
        if any(isinstance(value, list) or _is_text(value) for value in values):
            return questions
    return ()


def _expand_min(record: Record, questions: Collection[str]) -> Record:
    """Convert a row of JSON-MIN to a task with one annotation.

    Data and texts are not distinguished there, so texts other than the image are answers, except
    those of the keys `questions`.
    """
    results: list[Record] = []
    data: Record = {}
    for name, value in record.items():
        values = [] if name in _MIN_KEYS or name in questions else as_list(value)
        shapes = [one for one in values if isinstance(one, dict)]
        if values and len(shapes) == len(values):
            for index, shape in enumerate(shapes):
                sizes = {key: shape.pop(key) for key in _SIZE_KEYS if key in shape}
                names = {"id": f"{name}-{index}", "from_name": name}
                results.append({**sizes, **names, "value": shape})
        elif values and all(isinstance(v, str) and not _is_image_reference(v) for v in values):
            results.append({"id": name, "from_name": name, "value": {"text": values}})
        elif name != "id":
            data[name] = value
    return {"id": record.get("id"), "data": data, "annotations": [{"result": results}]}


def _is_image_reference(value: object) -> bool:
    is_on_server = isinstance(value, str) and value.startswith((LOCAL_FILES_PATH, UPLOAD_PATH))
    return is_on_server or (isinstance(value, str) and is_image_value(value))


def _get_image_reference(data: Mapping[str, Any], where: str) -> str:
    keys = [key for key, value in data.items() if _is_image_reference(value)]
    key = "image" if "image" in keys or len(keys) != 1 else keys[0]
    value = data.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise UserError(
        f"{len(keys)} images in the data {', '.join(map(str, data))[:80]}",
        where=where,
        expected="one image path or URL, or the key image",
        remedy="remove the task, or keep one image per task",
    )


def get_local_path(reference: str) -> str | None:
    """Return the path below the folder of files or uploads of a Label Studio server.

    Returns None for other references, such as web URLs and absolute paths.
    """
    if reference.startswith(LOCAL_FILES_PATH):
        path = "".join(parse_qs(urlsplit(reference).query).get("d", ()))
    elif reference.startswith(UPLOAD_PATH):
        path = unquote(reference.removeprefix("/data/"))
    else:
        return None
    return None if ".." in PurePosixPath(path).parts else path.lstrip("/")


def _find_images(source: Path, prefix: str, references: Sequence[str]) -> dict[str, str]:
    """Map image references with a prefix to local paths. Raises UserError for ambiguous ones."""
    names = {
        one: PurePosixPath(path)
        for one in dict.fromkeys(references)
        if one.startswith(prefix) and (path := get_local_path(one))
    }
    depth = max((len(path.parts) for path in names.values()), default=0)
    variants = [
        {one: "/".join(path.parts[level:] or path.parts[-1:]) for one, path in names.items()}
        for level in range(depth)
    ]
    variants.append({one: _UPLOAD_PREFIX.sub("", path.name) for one, path in names.items()})
    for variant in variants if names else ():
        try:
            folder = find_image_folder(source, list(variant.values()))
        except UserError:
            continue
        name, count = Counter(variant.values()).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{count} images of the Label Studio server have the name {name!r} in {folder}",
                where=str(source),
                expected="the folders of the server, which contain images of equal names",
                remedy="copy the folders, not only the images, next to this file",
            )
        return {one: str(find_existing(folder, n) or folder / n) for one, n in variant.items()}
    return {one: str(path) for one, path in names.items()}


_GEOMETRY_KEYS = frozenset({"x", "points", "rle", "sequence", "vertices", "imageDataURL"})
_RECTANGLE_KEYS = ("x", "y", "width", "height")
_ANSWER_KEYS = ("choices", "text", "number", "rating", "datetime")


def _merge_regions(results: Sequence[Record]) -> list[Record]:
    """Merge the results of each region, such as its rectangle and its text, by their ID."""
    regions: dict[str, Record] = {}
    for index, result in enumerate(results):
        value = result.get("value")
        if isinstance(value, dict) and not _GEOMETRY_KEYS.isdisjoint(value):
            region_id, kind = str(result.get("id", index)), result.get("type", "region")
            region = regions.setdefault(region_id, {"type": kind})
            sizes = {key: result[key] for key in _SIZE_KEYS if key in result}
            region.update(sizes | value)
    return list(regions.values())


_SIZE_KEYS = ("original_height", "original_width", "image_rotation")


def _merge_answers(results: Sequence[Record]) -> dict[str, tuple[str, list[Any]]]:
    """Return kind and values of each control whose answer is about the whole image."""
    answers: dict[str, tuple[str, list[Any]]] = {}
    for result in results:
        value = result.get("value")
        if isinstance(value, dict) and _GEOMETRY_KEYS.isdisjoint(value):
            for kind in _ANSWER_KEYS:
                values = [one for one in as_list(value.get(kind)) if one != ""]
                if values:
                    answers.setdefault(str(result.get("from_name")), (kind, []))[1].extend(values)
    return answers


def _collect_labels(tasks: Sequence[LabeledTask]) -> ProjectLabels:
    classes, points, choices, controls = set[str](), set[str](), set[str](), dict[str, None]()
    has_regions, text_classes = False, set[str]()
    for task in tasks:
        for region in _merge_regions(task.results):
            has_regions, labels = True, _get_labels(region)
            text_classes.update(labels or [UNKNOWN_LABEL] if region.get("text") else ())
            classes.update(labels if _has_bounds(region) else ())
            points.update(name for name, _ in _list_points(region))
        for name, (kind, values) in _merge_answers(task.results).items():
            controls[name] = None
            choices.update(map(str, values) if kind == "choices" else ())
    names, point_names, answers = (tuple(sorted(one)) for one in (classes, points, choices))
    texts = frozenset(text_classes)
    questions = _find_questions([task.texts for task in tasks])
    return ProjectLabels(
        names, point_names, answers, tuple(controls), has_regions, texts, questions
    )


def _get_labels(region: Record) -> list[str]:
    labels = [label for key in region if key.endswith("labels") for label in as_list(region[key])]
    return [str(label) for label in labels if str(label).strip()]


def _has_bounds(region: Record) -> bool:
    return not region.keys().isdisjoint({"points", "rle"}) or region.keys() >= {*_RECTANGLE_KEYS}


def _list_points(region: Record) -> list[tuple[str, list[float]]]:
    """Return the point of a keypoint with each of its labels."""
    if region.keys() & {"height", "radiusX", "points", "rle"}:
        return []
    x, y = region.get("x"), region.get("y")
    if not isinstance(x, int | float) or not isinstance(y, int | float):
        return []
    return [(label, [x / 100, y / 100]) for label in _get_labels(region)]


def _parse_region(
    region: Record, context: ImportContext, project: ProjectLabels
) -> Iterator[ObjectAnnotation]:
    """Yield the box of a region with each of its labels, or its labels without a box."""
    labels = _get_labels(region)
    is_read = _has_bounds(region) and context.box_task != "points"
    for kind in _ANSWER_KEYS:
        is_ignored = kind in region and not (is_read and kind == "text")
        context.row_notes[f"{kind} of regions (ignored)"] += is_ignored
    if not _has_bounds(region):
        enclose_shape(f"regions of type {region['type']}", None, context)
        points = _list_points(region)
        yield from (ObjectAnnotation(label, None) for label in labels[1:])
        yield ObjectAnnotation((labels or [UNKNOWN_LABEL])[0], None, points=points)
        return
    if region.get("image_rotation") or not (labels or project.text_classes):
        raise InvalidBoxError(
            f"the {region['type']} {str(region)[:80]}",
            expected="a region with a label, in an image that is not rotated in the editor",
            remedy="correct the region in Label Studio, or remove it",
        )
    text = "\n".join(map(str, as_list(region.get("text"))))
    shape = _parse_geometry(region, context)
    if not project.text_classes:
        yield from (replace(shape, label=label) for label in labels)
    elif text.strip():
        attributes = {"class": labels[0]} if labels else {}
        attributes |= {"further_classes": ", ".join(labels[1:])} if labels[1:] else {}
        yield replace(shape, label=text, attributes=attributes)
    else:
        context.shape_notes[NOTE_NO_TEXT] += 1
        if not project.text_classes.isdisjoint(labels or [UNKNOWN_LABEL]):
            yield ObjectAnnotation(UNKNOWN_LABEL, None)


def _parse_geometry(region: Record, context: ImportContext) -> ObjectAnnotation:
    """Return an object with its box as normalized corner and size, None without area."""
    polygons, num_holes = list[Any](), 0
    outline_mask = trace_mask if context.box_task == "polygons" else enclose_mask
    expected = "numbers in percent, and the original size of the image"
    with translate_shape_errors(region, expected, region["type"]):
        if "rle" in region:
            kind, (height, width) = "brush strokes", map(region.__getitem__, _SIZE_KEYS[:2])
            traced, num_holes, _ = outline_mask(decode_brush(region["rle"], (height, width)))
            polygons = [[(x / width, y / height) for x, y in one] for one in traced]
        elif "points" in region:
            kind = "polygons"
            polygons = [[(float(x) / 100, float(y) / 100) for x, y in region["points"]]]
        else:
            x, y, width, height = (float(region[key]) / 100 for key in _RECTANGLE_KEYS)
            angle = float(region.get("rotation") or 0)
            if not angle:
                return ObjectAnnotation(UNKNOWN_LABEL, [x, y, width, height])
            kind = "rotated rectangles"
            # Around the top left corner, in units of the image width.
            aspect = float(region["original_height"]) / float(region["original_width"])
            flat = x, y * aspect, x + width, (y + height) * aspect
            polygons = [[(x, y / aspect) for x, y in rotate_rectangle(flat, angle, flat[:2])]]
        bounds = find_bounds(itertools.chain(*polygons), region) if polygons else None
    outlines = Outlines(polygons, num_holes)
    bounds = enclose_shape(kind, bounds, context, outlines)
    box = bounds and [*bounds[:2], bounds[2] - bounds[0], bounds[3] - bounds[1]]
    return ObjectAnnotation(UNKNOWN_LABEL, box, outlines)


def _parse_answers(row: SourceRow, question: str, context: ImportContext) -> list[ImportExample]:
    """Build the example of a task without regions: a class, texts, or a JSON object."""
    project = row.record["project"]
    image = row.record["image"]
    answers = _merge_answers(row.record["task"].results)
    if not answers:
        context.skipped_rows[REASON_NO_ANSWER] += 1
        return []
    if len(project.controls) == 1:
        kind, values = answers[project.controls[0]]
        texts = list(dict.fromkeys(map(str, values)))
        if kind != "choices":
            with _ask(question, context):
                return [build_text_example(row.id, image, texts, (), context)]
        texts, meta = [", ".join(texts)], {"classes": list(project.choices)}
        # The prompt is a template, in contrast to the question.
        with _ask(question.replace("{", "{{").replace("}", "}}"), context):
            return [build_text_example(row.id, image, texts, project.choices, context, meta)]
    fields = {
        name: values[0] if len(values) == 1 else values
        for name in project.controls
        if name in answers
        for _, values in [answers[name]]
    }
    prompt = FIELDS_PROMPT.format(labels=", ".join(project.controls))
    text = json.dumps(fields, ensure_ascii=False)
    if question and context.prompt is None:
        question = f"{question}\n{prompt}"
    with _ask(question, context):
        return [build_text_example(row.id, image, [text], (), context, None, prompt)]


def _get_class_and_text(box: ExportBox) -> tuple[str, str | None]:
    class_name = box.attributes.get("class")
    return (class_name, box.label) if isinstance(class_name, str) else (box.label, None)


def _build_label_config(
    records: Sequence[ImageRecord], *, is_detection: bool, has_choices: bool
) -> bytes:
    """Build the labeling configuration (XML) of a project with the exported labels."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    declared = [name for record in records for name in record.meta.get("classes", ())]
    boxes = [_get_class_and_text(box) for record in records for box in record.boxes]
    names = dict.fromkeys([*declared, *sorted({class_name for class_name, _ in boxes})])
    target, editable = {"toName": "image"}, {"editable": "true"}
    if is_detection or has_choices:
        tag, item, control_name = "Choices", "Choice", "answer"
        if is_detection:
            tag, item, control_name = "RectangleLabels", "Label", "label"
        control = ElementTree.SubElement(view, tag, target, name=control_name)
        for name in names:
            ElementTree.SubElement(control, item, value=name)
    else:
        ElementTree.SubElement(view, "TextArea", target | editable, name="answer")
    if is_detection and any(text is not None for _, text in boxes):
        ElementTree.SubElement(view, "TextArea", target | editable, name="text", perRegion="true")
    ElementTree.indent(view)
    return bytes(ElementTree.tostring(view, "utf-8")) + b"\n"


COMPONENT = DatasetFormat(
    name="label-studio",
    description='a .json file of [{"data": {"image": ...}, "annotations": [{"result": [...]}]}]',
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "box_task"}),
    open_dataset=open_tasks,
    write_files=write_files,
    position=70,
)
