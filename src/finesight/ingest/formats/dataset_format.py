"""Interface of dataset formats, and the state of an import or export that they share."""

from __future__ import annotations

import ast
import base64
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finesight.components import Component, NoSettings
from finesight.errors import UserError, describe_indices
from finesight.files.bounded_files import DuplicateKeyError, parse_unique_json
from finesight.ingest.formats.row_keys import has_value, sort_keys
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.row_reader import Record, RowReader, SourceRow
from finesight.plugins import PluginKind
from finesight.samples.boxes import (
    InvalidBoxError,
    StrayBoxError,
    TextBox,
    clip_box,
    clip_to_image,
    parse_coordinates,
)
from finesight.samples.frames import PIXELS, UNIT_FRAMES, Box, BoxFrame, Order, Unit, get_frame
from finesight.samples.sample import (
    MAX_BOXES,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    InvalidTurnsError,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
    check_json,
    check_limit,
    create_region,
    expand_images,
    is_video_path,
    join_text,
    list_coordinates,
)


@dataclass(frozen=True, slots=True)
class ImportExample:
    """A question of a dataset row with all its correct answers.

    Attributes:
        references: Further correct answers that are used only for scoring.
        rejected: Worse answer than the only one of `answers`, in preference data.
        label: Whether the answer is desirable; None without a verdict.
        tools: Definitions of the tools that the answers may call.
        loss: Whether training uses the answers.
        is_eval: Whether the row is one for validation, as the data set states.
    """

    id: str
    prompt_messages: tuple[Message, ...]
    answers: tuple[tuple[ContentPart, ...], ...]
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[ContentPart, ...] = ()
    label: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    loss: bool = True
    is_eval: bool = False

    def to_train_samples(self) -> list[Sample]:
        """Return one training sample per correct answer."""
        names = [f"{self.id}-{number}" for number in range(1, len(self.answers) + 1)]
        names = names if len(names) > 1 else [self.id]
        return [
            self._build_sample(name, answer, self.references)
            for name, answer in zip(names, self.answers, strict=True)
        ]

    def to_eval_sample(self) -> Sample:
        """Return an evaluation sample with the first answer, and the others as references."""
        answer, *others = self.answers
        texts = (join_text(other).rstrip("\n") for other in others)
        return self._build_sample(self.id, answer, (*texts, *self.references))

    def _build_sample(
        self, sample_id: str, answer: tuple[ContentPart, ...], references: tuple[str, ...]
    ) -> Sample:
        last = Message(role="assistant", content=answer, loss=self.loss)
        return Sample(
            id=sample_id,
            tools=self.tools,
            messages=(*self.prompt_messages, last),
            rejected=self.rejected,
            label=self.label,
            references=references,
            meta=self.meta,
        )


def build_example(
    sample_id: str,
    messages: Sequence[Message],
    meta: dict[str, Any],
    tools: tuple[dict[str, Any], ...] = (),
) -> ImportExample:
    """Build an example from messages whose last message is the only answer.

    Raises:
        InvalidTurnsError: The last message is not from the assistant.
    """
    if not messages or messages[-1].role != "assistant":
        raise InvalidTurnsError(
            f"{len(messages)} messages without an answer at the end",
            expected="an assistant message at the end",
            remedy="add the answer, or remove the row",
        )
    *turns, last = messages
    answers, loss = (last.content,), last.loss
    return ImportExample(sample_id, tuple(turns), answers, meta=meta, tools=tools, loss=loss)


Files = Iterator[tuple[str, bytes]]
"""Relative file names with content. A repeated name appends to the file."""

BoxTask = Literal["detection", "grounding", "points", "polygons"]
"""Task of a box dataset: one question per image, one per label, or about its points or outlines."""

InvalidBoxPolicy = Literal["fail", "drop", "clip"]
"""Treatment of invalid boxes: an error of the row, drop the box, or clip it to the image.

A box without area inside the image is dropped with `clip`, too. A dropped box that may mark an
object must not be missing in the answer: the question leaves out its class, or the import skips
or refuses the row.
"""

NOTE_THOUSANDTHS = (
    "boxes in texts, read as corners in thousandths of the image sides; --box-units changes it"
)
NOTE_PIXELS = (
    "JSON boxes and points in texts, read as pixels of the original image; --box-units changes it"
)
NOTE_KEPT_JSON = "answers of boxes (kept as JSON, which other answers have with further keys)"
NOTE_CLIPPED_BOX = "boxes outside their image (clipped)"
NOTE_MOVED_CORNER = "corners of polygons outside their image (moved to its edge)"
NOTE_SKIPPED_BOX = "invalid boxes (skipped)"

IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")

NUMBERED_IMAGE = re.compile(r"<[Ii]mage[ _]?[0-9]{1,9}>")
"""Placeholder of an image with its number: `<image 1>`, `<image_01>` or `<image1>`."""

_PLACEHOLDERS = re.compile(
    r"<\|(?:vision|image|video|box|quad|object_ref)(?:_\w+)?\|>|<img>|<(?:box|quad)>\s*[(\[]"
    rf"|<image>|<bbox>|<ref-object>|{NUMBERED_IMAGE.pattern}"
)


CLASS_PLACEHOLDER = re.compile(r"(?<!\{)\{labels?\}(?!\})")
"""Placeholder of class names in a prompt; doubled braces are literal ones."""

_ESCAPED_PLACEHOLDER = re.compile(r"\{(\{labels?\})\}")

_LEADING_MEDIA = re.compile(rf"(?:(?:<image>|<video>|{NUMBERED_IMAGE.pattern})\n?)+")


class UnexpectedPlaceholderError(UserError):
    """Raised when a text contains an image or box placeholder of another format."""


MIN_BASE64_CHARS = 32
"""Minimum length of a text that is recognized as base64; shorter ones may be words."""


def decode_base64_text(text: str, min_chars: int = MIN_BASE64_CHARS) -> str | None:
    """Decode a text in base64. Returns None for other texts and for binary data."""
    encoded = "".join(text.splitlines())
    if len(encoded) < min_chars:
        return None
    try:
        decoded = base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        return None
    return decoded if all(map(_is_text_character, decoded)) else None


def _is_text_character(character: str) -> bool:
    """Return whether a character may be a part of a text, such as a joiner of an emoji.

    Control characters and code points without a character are binary data.
    """
    return character in "\t\n\r" or unicodedata.category(character) not in ("Cc", "Cn")


class InvalidOptionError(UserError):
    """Raised when an import option does not apply to the source.

    It ends the import, in contrast to errors of single rows.
    """


class PlaceholderCountError(UserError):
    """Raised when the numbers of image placeholders and images in a row differ."""


@dataclass(frozen=True, slots=True)
class RawBox:
    """A box with its coordinates as stored in the source, and the declared frame."""

    coordinates: Box
    image_path: Path
    frame: BoxFrame


_OBJECT_REF = re.compile(
    r"<\|object_ref_start\|>((?:(?!<\|object_ref_).)*)<\|object_ref_end\|>", re.DOTALL
)


@dataclass(slots=True)
class ImportContext:
    """State of one import that dataset formats use to parse rows.

    Attributes:
        ignorable_columns: Columns that guessed roles of a table leave out; None for any.
        prompt: Question or prompt template from the user; None uses the default.
        replacement: Text that replaces the question of each example; None keeps the questions.
        box_format: Box format from the user; None uses the default of the dataset format.
        box_units: Box units from the user; None uses the default of the dataset format.
        box_task: Kind of the questions of box datasets.
        lenient: Accept every box unchanged, for data checks.
        has_box_options: Whether the format supports --box-format and --box-units.
        raw_boxes: Boxes of the current row with coordinates as stored in the source.
        num_clipped: Number of boxes that exceeded their image by a rounding error.
        row_notes: Counts of content of the current row that samples do not represent.
        other_keys: Number of keys in the current row that its format does not use, by description.
        invalid_boxes: Note and error of each clipped or dropped box of the current row.
        keeps_json: Keep JSON of boxes as JSON, instead of the notation of the model family.
        num_json: Number of JSON values of boxes only (False) and of structures with boxes (True).
    """

    images: ImageResolver
    columns: Mapping[str, str] = field(default_factory=dict)
    ignorable_columns: frozenset[str] | None = None
    prompt: str | None = None
    replacement: str | None = None
    box_format: Order | None = None
    box_units: Unit | None = None
    box_task: BoxTask = "detection"
    lenient: bool = False
    has_box_options: bool = True
    on_invalid_box: InvalidBoxPolicy = "fail"
    raw_boxes: list[RawBox] = field(default_factory=list)
    num_clipped: int = 0
    invalid_boxes: list[tuple[str, InvalidBoxError]] = field(default_factory=list)
    source_notes: Counter[str] = field(default_factory=Counter)
    row_notes: Counter[str] = field(default_factory=Counter)
    skipped_rows: Counter[str] = field(default_factory=Counter)
    other_keys: Counter[str] = field(default_factory=Counter)
    keeps_json: bool = False
    num_json: Counter[bool] = field(default_factory=Counter)

    def restart_with_json(self) -> None:
        """Reset the counts, to parse all rows again with one notation of boxes."""
        self.keeps_json, self.num_clipped = True, 0
        self.source_notes.clear()
        self.skipped_rows.clear()
        self.source_notes[NOTE_KEPT_JSON] = self.num_json[False]

    @property
    def shape_notes(self) -> Counter[str]:
        """Counts of shapes that questions about boxes or polygons do not represent."""
        return Counter() if self.box_task == "points" else self.row_notes

    def resolve_frame(self, default: BoxFrame) -> BoxFrame:
        """Return the frame that the user gives, else that of the dataset format.

        Raises:
            InvalidOptionError: The frame of the format, such as that of a plug-in, has no unit.
        """
        if default.unit is None:
            raise InvalidOptionError(
                f"the format reads boxes in {default}, which has no unit",
                expected=f"a frame of get_frame: one of {', '.join(UNIT_FRAMES)}",
                remedy="correct the format, or convert the boxes to pixels in it",
            )
        order = self.box_format or default.order
        if self.box_units is None:
            return replace(default, order=order)
        return get_frame(order, self.box_units)

    def read_box(self, value: object, image_path: Path, default: BoxFrame) -> Box:
        """Convert the coordinates of a row to two corners in pixels, equal for a point.

        Args:
            default: Frame of the dataset format; it needs a unit, see `get_frame`.

        Raises:
            InvalidBoxError: The value is not a box, or the box is not inside the image; see
                `clip_to_image`. A lenient import accepts a box outside the image.
        """
        frame = self.resolve_frame(default)
        coordinates = parse_coordinates(value)
        is_point = len(coordinates) == 2
        if is_point:
            # `--box-format` is the order of boxes; a mapping states that of its points.
            order: Order = "yxyx" if default.order == "yxyx" else "xyxy"
            frame = replace(frame, order=order)
        a, b, c, d = (*coordinates, *coordinates)[:4]
        self.raw_boxes.append(RawBox((a, b, c, d), image_path, frame))
        if self.lenient and frame.base == "image":
            return frame.to_pixels((a, b, c, d), (0, 0))
        image_size = self.images.image_size(image_path)
        pixel_box = frame.to_pixels((a, b, c, d), image_size)
        if self.lenient:
            return pixel_box
        try:
            is_corner = is_point and self.box_task == "polygons"
            clipped_box = clip_to_image(
                pixel_box, image_size, frame, is_point=is_point, is_corner=is_corner
            )
        except InvalidBoxError as error:
            inner_box, note = clip_box(pixel_box, image_size, is_point=is_point), NOTE_CLIPPED_BOX
            if self.box_task == "polygons" and all(map(math.isfinite, pixel_box)):
                limits = np.array((image_size[::-1] * 2), float)
                inner_box, note = tuple(np.clip(pixel_box, 0, limits).tolist()), NOTE_MOVED_CORNER
            option = "leave it out"
            if inner_box is not None and inner_box != pixel_box:  # else not in pixels
                option = "give --on-invalid-box clip"
                if self.on_invalid_box == "clip":
                    self.invalid_boxes.append((note, error))
                    return inner_box
            hint = f"{error.remedy}; otherwise " if self.has_box_options else ""
            error.remedy = f"{hint}correct the row, or {option}"
            raise
        self.num_clipped += clipped_box != pixel_box
        return clipped_box

    def add_prompt(self, parts: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
        """Append the text of `--prompt` to the parts of the first user turn.

        It starts on a new line after existing text.
        """
        if self.prompt is None and not any(p.type == "text" and p.text.strip() for p in parts):
            raise UserError(
                f"a question without text (images: {len(parts)})",
                expected="a question about the image",
                remedy='give --prompt "..." (or --prompt "" for the image without text)',
            )
        if not self.prompt:
            return tuple(parts)
        prompt = read_prompt(self.prompt)
        if parts and isinstance(parts[-1], TextPart):
            return (*parts[:-1], TextPart(text=f"{parts[-1].text}\n{prompt}"))
        return (*parts, TextPart(text=prompt))


def read_prompt(prompt: str) -> str:
    """Return the question of a prompt for data without class names.

    `{{label}}` and `{{labels}}` are literal `{label}` and `{labels}`.

    Raises:
        InvalidOptionError: The prompt inserts class names.
    """
    placeholder = CLASS_PLACEHOLDER.search(prompt)
    if placeholder is not None:
        raise InvalidOptionError(
            f"no class names for {placeholder[0]}",
            where="--prompt",
            expected="a text without it, unless the data have a list or a column of classes",
            remedy=f"write the names instead of {placeholder[0]}, or {{{placeholder[0]}}} for this"
            " word itself",
        )
    return _ESCAPED_PLACEHOLDER.sub(r"\1", prompt)


def example_from_sample(sample: Sample, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample with absolute image paths.

    Its boxes are validated and clipped to their images, unless the import is lenient.
    """
    images = [Path(part.image) for part in sample.iter_parts() if isinstance(part, ImagePart)]

    def fitted(part: ContentPart) -> ContentPart:
        if not isinstance(part, BoxPart) or part.image >= len(images):
            return part
        xyxy = context.read_box(list_coordinates(part), images[part.image], PIXELS)
        return part.model_copy(update={"xyxy": xyxy})

    sample = sample.with_parts(fitted)
    example = build_example(sample.id, sample.messages, sample.meta, sample.tools)
    references, rejected, label = sample.references, sample.rejected, sample.label
    return replace(example, references=references, rejected=rejected, label=label)


class RowImages:
    """Images of one dataset row in order of appearance, to which boxes refer by index."""

    def __init__(self, context: ImportContext) -> None:
        self.context = context
        self._boxes = 0
        self.paths: list[Path] = []

    def add_image(self, value: object) -> ImagePart:
        """Resolve an image of the row and return its image part.

        The value is a path, a URL or embedded bytes; see `ImageResolver.resolve`.
        """
        if isinstance(value, dict):
            path, is_url = value.get("path"), not (value.get("bytes") or value.get("path"))
            used = ("bytes", "path", "url")[: 2 + is_url]
            sort_keys(value, used, "images", self.context.other_keys, (str(path),))
            value = value.get("url") if is_url else value
        self.paths.append(self.context.images.resolve(value))
        return ImagePart(image=str(self.paths[-1]))

    def add_video(self, value: object) -> VideoPart:
        """Resolve a video file, a list of frames or a folder of them; return the video part."""
        if isinstance(value, str) and is_video_path(value.strip()):
            return VideoPart(video=str(self.context.images.resolve(value)))
        frames = self.context.images.resolve_frames(value)
        return VideoPart(frames=tuple(map(str, frames)))

    def create_box(
        self,
        value: object,
        label: str | None,
        default: BoxFrame,
        image_index: int | None = None,
    ) -> BoxPart:
        """Create a box part from four coordinates, or a point part from two.

        Args:
            default: Frame of the dataset format; it needs a unit, see `get_frame`.
            image_index: 0-based index of the image; None is the last added image.
        """
        if not self.paths:
            raise UserError(
                f"the box {value} precedes the first image",
                expected="an image before the box",
                remedy="move the image first, or remove the row",
            )
        self._boxes += 1
        check_limit(self._boxes, MAX_BOXES, "boxes")
        resolved_index = len(self.paths) - 1 if image_index is None else image_index
        if resolved_index >= len(self.paths):
            raise InvalidBoxError(
                f"a box in image {resolved_index} (0-based)",
                expected=describe_indices(len(self.paths), "image"),
                remedy="correct the row",
            )
        xyxy = self.context.read_box(value, self.paths[resolved_index], default)
        is_point = isinstance(value, list | tuple) and len(value) == 2
        return create_region(xyxy, label, is_point=is_point, image=resolved_index)

    @property
    def list_limits(self) -> tuple[float, float] | None:
        """Maximum x and y of boxes in the units that the user gives, None if not given."""
        context = self.context
        if context.box_format is None and context.box_units is None:
            return None
        frame = context.resolve_frame(PIXELS)
        height, width = frame.compute_size(*context.images.image_size(self.paths[-1]))
        return width, height

    def create_valid_box(
        self, value: object, label: str | None, default: BoxFrame, *, is_text: bool = False
    ) -> BoxPart | InvalidBoxError:
        """Create a box part, or return the error of an invalid box that the import drops.

        A point is invalid outside of a text without `--box-task points`, also if boxes are dropped.
        """
        allows_points = is_text or self.context.box_task in ("points", "polygons")
        if isinstance(value, list | tuple) and len(value) == 2 and not allows_points:
            expected, remedy = "four coordinates", "correct the row, or give --box-task points"
            raise InvalidRowError(f"the box {str(value)[:80]}, a point", expected, remedy)
        try:
            return self.create_box(value, label, default)
        except InvalidBoxError as error:
            return self.drop_box(error)

    def drop_box(self, error: InvalidBoxError) -> InvalidBoxError:
        """Return the error of a box that the import drops, else raise it."""
        if self.context.on_invalid_box == "fail":
            if isinstance(error, StrayBoxError):
                error.remedy = f"{error.remedy}, or give --on-invalid-box drop"
            raise error
        self.context.invalid_boxes.append((NOTE_SKIPPED_BOX, error))
        return error

    def create_text_box(self, box: TextBox) -> BoxPart:
        """Create the part of a box within a text, which an import cannot drop.

        Raises:
            InvalidRowError: The text between the tags of the box is no box.
        """
        if isinstance(box.coordinates, str):
            raise InvalidRowError(
                f"{box.coordinates[:60]!r} between box tokens: not a box",
                "the corners of a box, (x1,y1),(x2,y2) or [x1,y1,x2,y2], or a point, (x,y)",
                "correct the row, or leave it out",
            )
        if box.is_tagged and self.context.box_format == "yxyx":
            raise InvalidRowError(
                "a box in special tokens, with --box-format yxyx",
                "boxes whose notation leaves the order open",
                "leave --box-format out: tags have x first, and the grid of location tokens is read"
                " with y first",
            )
        note = NOTE_THOUSANDTHS if box.is_tagged else NOTE_PIXELS
        self.context.row_notes[note] += self.context.box_units is None
        frame = get_frame("xyxy", "1000") if box.is_tagged else PIXELS
        try:
            return self.create_box(*box[:2], frame)
        except InvalidBoxError as error:
            if self.context.on_invalid_box != "drop":
                raise
            raise forbid_drop(error, "a box within a text cannot be dropped") from error

    def create_boxes(self, values: Iterable[TextBox]) -> list[BoxPart]:
        """Create the box parts of `bbox_2d` values with their labels, except stray boxes.

        Raises:
            InvalidBoxError: A box is invalid, and the import does not drop it, it may mark an
                object, or no other is left.
        """
        found = [self.create_valid_box(*box[:2], PIXELS, is_text=True) for box in values]
        boxes = [one for one in found if isinstance(one, BoxPart)]
        errors = [one for one in found if isinstance(one, InvalidBoxError)]
        for error in errors:
            if not boxes or not isinstance(error, StrayBoxError):
                raise forbid_drop(error)
        self.context.row_notes[NOTE_PIXELS] += len(boxes) * (self.context.box_units is None)
        return boxes

    def require_single_image(self) -> None:
        """Raise UserError unless the row has exactly one image, to which all boxes belong."""
        if len(self.paths) != 1:
            raise UserError(
                f"boxes in a row with {len(self.paths)} images",
                expected="one image, so that the image of each box is unambiguous",
                remedy="write the rows as samples, where each box has an image index",
            )


def forbid_drop(
    error: InvalidBoxError, reason: str = "the answer would be incomplete without the box"
) -> InvalidBoxError:
    """Return the error of an invalid box that the import must not drop."""
    return InvalidBoxError(f"{error.what}; {reason}", expected=error.expected, remedy=error.remedy)


@dataclass(slots=True)
class ExportContext:
    """State of one export that dataset formats use to write files.

    Attributes:
        image_names: Path relative to the output folder, by absolute image path.
        image_size: Returns height and width of an image in pixels after EXIF rotation, or raises
            CorruptImageError.
    """

    image_names: Mapping[Path, str]
    image_size: Callable[[Path], tuple[int, int]]
    lost_counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def name_image(self, located_sample: LocatedSample, name: str) -> str:
        """Return the output path of an image of a sample."""
        return self.image_names[located_sample.resolve_path(name)]


_TURN_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "history",
    "chosen",
    "rejected",
    "rejected_messages",
    "rejected_conversations",
)
_QUESTION_KEYS = "messages", "prompt", "conversations", "conversation"
"""Keys of turns that may end with a question, whose answer is under another key."""

_SOLUTION_KEYS = "solution", "ground_truth", "answer", "response", "output"
"""Keys of the answer to the question at the end of the turns, from the most complete one."""

_PAIR_KEYS = "chosen", "completion"
_LABEL_KEYS = "label", "kto_tag"
"""Keys of the verdict on an answer: of TRL and ms-swift, and of LLaMA-Factory."""

_OBJECT_KEYS = ("images", "image", "videos", "objects")

MAX_LITERAL_CHARS = 2**20
"""Maximum number of characters of a list that is written as a Python literal."""


def decode_json_lists(record: Record) -> Record:
    """Return a conversation row with its turns, images and objects parsed if they are text.

    The text is JSON or, in tables written by pandas, a Python literal. Other text is returned
    unchanged.
    """
    texts = {
        key: value
        for key in (*_TURN_KEYS, *_OBJECT_KEYS)
        if isinstance(value := record.get(key), str) and value.lstrip()[:1] in ("[", "{")
    }
    decoded = {
        key: decode_json_list(text, (dict, list) if key in _TURN_KEYS else (dict, list, str))
        for key, text in texts.items()
    }
    return {**record, **decoded} if texts else record


def split_preference(record: Record) -> list[Record]:
    """Return the rows of the chosen and of the rejected answer of a preference row.

    Supported are the keys of TRL (`prompt`, `chosen`, `rejected`), ms-swift (`rejected_response`,
    `rejected_messages`) and LLaMA-Factory (`conversations` or `instruction` with `chosen` and
    `rejected`), `rejected_conversations`, and `preferred_output` with `non_preferred_output` of
    OpenAI. Any other row is returned alone.
    """
    pair = ("chosen", "rejected")
    record = _append_solution(_read_cauldron(_read_openai_preference(record)))
    turns_key = "messages"
    if "messages" not in record and isinstance(record.get("conversations"), list):
        turns_key = "conversations"
    rejected_key = f"rejected_{turns_key}"
    rejected_keys = ("rejected_response", rejected_key)
    others = {k: v for k, v in record.items() if k not in (*pair, *rejected_keys)}
    if all(isinstance(record.get(key), str | list | dict) and record[key] for key in pair):
        if "question" in others and "prompt" not in others:
            others["prompt"] = others.pop("question")
        prompt = others.get("prompt")
        if isinstance(prompt, str) and all(_has_question(record[k], prompt) for k in pair):
            del others["prompt"]  # the turns contain the question: it would be asked twice
        for question, key in (("instruction", "output"), ("prompt", "completion")):
            if question in others:
                return [{**others, key: record[name]} for name in pair]
        turns = next((k for k in ("conversations", "messages") if has_value(record.get(k))), None)
        if turns is not None or all(isinstance(record[name], list) for name in pair):
            key, prompt = turns or "messages", as_list(record.get(turns or "messages"))
            return [{**others, key: [*prompt, *as_list(record[name])]} for name in pair]
    if all(has_value(record.get(key)) for key in rejected_keys):
        return [dict(record)]  # refused: only one worse answer is possible
    return _split_rejected(record, others, turns_key)


def _split_rejected(record: Record, others: Record, turns_key: str) -> list[Record]:
    """Return the rows of an answer and of the worse one under `rejected_response` or such turns."""
    text = record.get("rejected_response")
    rejected = record.get(f"rejected_{turns_key}")
    turns = record.get(turns_key)
    if isinstance(text, str) and text:
        if "response" in record:
            return [others, {**others, "response": text}]
        if isinstance(turns, list):
            rejected = [*turns[:-1], {"role": "assistant", "content": text}]
    if isinstance(rejected, list) and rejected:
        return [others, {**others, turns_key: rejected}]
    return [dict(record)]


def _read_openai_preference(record: Record) -> Record:
    """Return a preference row of OpenAI, whose turns are inside of `input`, as one of TRL."""
    prompt = record.get("input")
    answers = ("preferred_output", "non_preferred_output")
    if not isinstance(prompt, dict) or not isinstance(prompt.get("messages"), list):
        return record
    if not all(isinstance(record.get(key), list) and record[key] for key in answers):
        return record
    others = {key: value for key, value in record.items() if key not in ("input", *answers)}
    if {*prompt, "chosen", "rejected"} & others.keys():
        return record  # refused: two values for one key
    preferred, rejected = (record[key] for key in answers)
    return {**others, **prompt, "chosen": preferred, "rejected": rejected}


def _read_cauldron(record: Record) -> Record:
    """Return a row of The Cauldron, with pairs under `texts`, as a row with `messages`."""
    roles, pairs = ("user", "assistant"), list[Any](as_list(record.get("texts")))
    keys = [{*one} if isinstance(one, dict) else set() for one in pairs]
    is_known = all({*roles} <= names <= {*roles, "source"} for names in keys)
    if not pairs or not is_known or {"messages", "source"} & record.keys():
        return record
    turns = [{"role": role, "content": pair[role]} for pair in pairs for role in roles]
    sources = ", ".join(dict.fromkeys(str(one["source"]) for one in pairs if "source" in one))
    others = {key: value for key, value in record.items() if key != "texts"}
    return {**others, **({"source": sources} if sources else {}), "messages": turns}


def _append_solution(record: Record) -> Record:
    """Return a row whose turns end with a question, with its separate answer as last turn.

    Such rows are those of reinforcement tuning (TRL, ms-swift, verl, MM-Eureka). A row whose answer
    is ambiguous is unchanged, so that it is an error.
    """
    key = next((one for one in _QUESTION_KEYS if isinstance(record.get(one), list)), None)
    if key is None or not record.keys().isdisjoint(_PAIR_KEYS):
        return record
    turns = record[key]
    if not turns or not _is_question(turns[-1]):
        return record
    found = _find_solution(record)
    if found is None:
        return record
    solution_key, text = found
    others = {one: value for one, value in record.items() if one not in (key, solution_key)}
    if turns[-1].get("value") is not None:
        return {**others, key: [*turns, {"from": "assistant", "value": text}]}
    return {**others, "messages": [*turns, {"role": "assistant", "content": text}]}


def _is_question(turn: object) -> bool:
    """Return whether a turn is one of the user, in any layout."""
    if not isinstance(turn, dict):
        return False
    return (turn.get("from") or turn.get("role")) in ("user", "human")


def _find_solution(record: Record) -> tuple[str, str] | None:
    """Return the key and the text of the answer of a row; None without one, or with two answers.

    The answer of verl is nested: `reward_model.ground_truth`. Its key remains in the row.
    """
    texts: dict[str, str] = {}
    grader = record.get("reward_model")
    if isinstance(grader, dict):
        nested = _format_solution(grader.get("ground_truth"), is_single=False)
        if nested:
            texts["reward_model.ground_truth"] = nested
    for key in _SOLUTION_KEYS:
        value = record.get(key)
        text = _format_solution(value, is_single=key == "solution")
        if text:
            texts[key] = text
        elif has_value(value) and value == value:  # NaN is a missing value of a table
            return None
    if not texts:
        return None
    # A solution may contain the short answer of another key.
    key, text = next(iter(texts.items()))
    if not all(_contains_word(text, other.strip()) for other in texts.values()):
        return None
    return key, text


def _contains_word(text: str, part: str) -> bool:
    """Return whether a text contains another one that is no part of a longer word or number."""
    return re.search(rf"(?<![\w.]){re.escape(part)}(?![\w.]*\w)", text) is not None


def _format_solution(value: object, *, is_single: bool) -> str:
    """Format the answer of a row as text; empty if it is none.

    Args:
        is_single: A list of texts is one answer. Otherwise it may be one of alternatives.
    """
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, list | tuple):
        is_answer = bool(value) and (is_single or is_numeric(value))
        with suppress(ValueError):  # such a list is no answer
            return dump_json(value) if is_answer else ""
        return ""
    if not isinstance(value, int | float):
        return ""
    return str(value) if math.isfinite(value) else ""


def is_numeric(value: object) -> bool:
    """Return whether a value is a number, or a list of numbers, such as a box or several."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(is_numeric, value))
    return isinstance(value, int | float) and value == value


def dump_json(value: object) -> str:
    """Write a value as JSON. Values of other types, such as dates, become text.

    Raises:
        ValueError: The value has bytes, NaN, infinity, or too many levels.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_convert_to_text)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _convert_to_text(value: object) -> str:
    if isinstance(value, bytes):
        raise ValueError(f"{len(value)} bytes that are not text")
    return str(value)


def _has_question(turns: object, prompt: str) -> bool:
    """Return whether an answer of a preference row is a conversation with this prompt."""
    for turn in turns if isinstance(turns, list) else ():
        names = (turn.get("role"), turn.get("from")) if isinstance(turn, dict) else ()
        text = (turn.get("content") or turn.get("value")) if any(names) else None
        if any(name in ("user", "human", "system") for name in names) and (
            not isinstance(text, str) or text.strip() in prompt or prompt.strip() in text
        ):
            return True
    return False


def decode_json_list(text: str, item_types: tuple[type, ...]) -> object:
    """Parse a list in JSON or as a Python literal; return other text unchanged."""
    try:
        check_json(text.encode(errors="replace"), "")
        value = parse_unique_json(text)
    except DuplicateKeyError:
        return text
    except ValueError:
        try:
            value = ast.literal_eval(text) if len(text) < MAX_LITERAL_CHARS else text
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
    items = value if isinstance(value, list) else [value]
    return value if items and all(isinstance(item, item_types) for item in items) else text


def describe_value(value: object) -> str:
    """Return the start of a value that is no list, and the position of an error in its JSON."""
    text = str(value)[:60]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            position = f"line {error.lineno}, column {error.colno} of its text"
            return f"{text!r}, which is not valid JSON at {position}: {error.msg}"
        except (ValueError, RecursionError):
            pass
    return repr(text)


@dataclass(frozen=True)
class DatasetFormat(Component[Any]):
    """A dataset format: how to detect, parse and write it. Plug-ins give no kind, and no title.

    Attributes:
        position: Place of a built-in format in detection and in lists. Specific formats precede
            general ones, which accept more rows.
        detect: Function that returns the reason why records match this format, or None. By
            default, a format is detected when its source is opened, or selected explicitly.
        supported_options: Supported import options: "map", "prompt", "boxes", "box_task".
        open_dataset: Function that opens sources other than row files, such as a folder or a COCO
            document. It returns the rows and the reason for the match, or None.
        open_requested: Function that replaces `open_dataset` if the user names the format. It
            raises UserError with the reason for a mismatch.
        map_columns: Function that returns the column of each role for tables with known columns,
            from the first records and the columns of `--map`.
        write_files: Function that yields relative file names with content; a repeated name appends.
            It raises UserError for a sample that the format cannot represent.
        open_encoded: Function that opens a folder whose tables have a given encoding.
        may_be_table: Function that returns whether detected records may be a table instead.
        group_rows: Function that joins rows after they are opened, and rows of other files, for
            mapping files. It gets the data file.
        check_left_out: Function that raises UserError if a row has texts that the format leaves
            out. It is called for the first rows if the format is detected.
        is_native: Whether the rows are samples, as training reads them.
        keeps_pages: Whether the format has pages of documents. An export to others saves them.
        reads_raw_rows: Whether `parse_row` reads all keys of a record itself, such as preference
            pairs, verdicts and lists in texts, which otherwise are the same for all formats.
        states_split: Whether each row states that it is for training or for validation.
        is_preset: Whether the keys of the records have selected this mapping.
        named_keys: Keys of records that the format names. They decide if a table has a header.
    """

    kind: PluginKind = field(default="formats", kw_only=True)
    name: str
    title: str = field(default="", kw_only=True)
    description: str
    parse_row: Callable[[SourceRow, ImportContext], ImportExample | list[ImportExample]]
    detect: Callable[[Sequence[Record]], str | None] | None = None
    supported_options: frozenset[str] = frozenset({"prompt", "boxes"})
    open_dataset: Callable[[Path], tuple[RowReader, str] | None] | None = None
    open_requested: Callable[[Path], tuple[RowReader, str] | None] | None = None
    map_columns: Callable[[Sequence[Record], Mapping[str, str]], Mapping[str, str]] | None = None
    write_files: Callable[[Sequence[LocatedSample], ExportContext], Files] | None = None
    open_encoded: Callable[[Path, str], tuple[RowReader, str] | None] | None = None
    may_be_table: Callable[[Sequence[Record]], bool] | None = None
    group_rows: Callable[[RowReader, Path], RowReader] | None = None
    check_left_out: Callable[[SourceRow], None] | None = None
    is_native: bool = False
    keeps_pages: bool = False
    reads_raw_rows: bool = False
    states_split: bool = False
    is_preset: bool = False
    named_keys: frozenset[str] = frozenset()

    def find_problem(self) -> str | None:
        """Return why other modules cannot use the format; None if they can.

        Plug-ins for version 0.1.0 may have own classes and a list of options.
        """
        if self.settings is not NoSettings or self.implementation:
            return "it has settings or an implementation, which formats do not support"
        if not isinstance(self.description, str):
            return f"description is {self.description!r:.60}, no text"
        if not isinstance(self.supported_options, Collection):
            return f"supported_options is {self.supported_options!r:.60}, no collection"
        flags = {
            "is_native": self.is_native,
            "keeps_pages": self.keeps_pages,
            "reads_raw_rows": self.reads_raw_rows,
            "states_split": self.states_split,
            "is_preset": self.is_preset,
        }
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                return f"{name} is {flag!r:.60}, neither True nor False"
        if not callable(self.parse_row):
            return f"parse_row is {self.parse_row!r:.60}, no function"
        functions = {
            "detect": self.detect,
            "open_dataset": self.open_dataset,
            "open_requested": self.open_requested,
            "map_columns": self.map_columns,
            "write_files": self.write_files,
            "open_encoded": self.open_encoded,
            "may_be_table": self.may_be_table,
            "group_rows": self.group_rows,
            "check_left_out": self.check_left_out,
        }
        for name, function in functions.items():
            if function is not None and not callable(function):
                return f"{name} is {function!r:.60}, no function"
        return None

    def parse_examples(self, row: SourceRow, context: ImportContext) -> list[ImportExample]:
        """Parse a row and return its examples as a list, which may be empty.

        Lists that a conversation row contains as JSON text are parsed, except in tables.
        """
        for notes in (context.row_notes, context.other_keys, context.invalid_boxes):
            notes.clear()
        is_raw = self.reads_raw_rows or "map" in self.supported_options
        records = [row.record] if is_raw else split_preference(decode_json_lists(row.record))
        has_label = len(records) == 1 and "rejected" not in row.record and not is_raw
        keys = [key for key in _LABEL_KEYS if isinstance(row.record.get(key), bool) and has_label]
        label = records[0].pop(keys[0]) if keys else None
        # The keys of the chosen row are counted, so it is parsed last.
        *rejected, result = (self._parse(row, record, context) for record in reversed(records))
        for (other,) in rejected:
            (chosen,) = result
            if chosen.prompt_messages != other.prompt_messages:
                raise InvalidRowError(
                    f"the prompts of both answers differ: {chosen.prompt_messages!s:.60}",
                    "a chosen and a rejected answer to one prompt",
                )
            result = [replace(chosen, rejected=other.answers[0])]
        if any(len(pages) > 1 for pages in context.images.pages.values()):
            result = [_expand_documents(one, context.images) for one in result]
        if context.replacement is not None:
            result = [_replace_prompt(one, context.replacement, context) for one in result]
        return result if label is None else [replace(one, label=label) for one in result]

    def _parse(self, row: SourceRow, record: Record, context: ImportContext) -> list[ImportExample]:
        context.other_keys.clear()
        result = self.parse_row(replace(row, record=record), context)
        return [result] if isinstance(result, ImportExample) else result


def _expand_documents(example: ImportExample, images: ImageResolver) -> ImportExample:
    """Replace each document of several pages by its pages, to which boxes cannot refer."""

    def list_pages(image: str) -> list[str]:
        return list(map(str, images.list_pages(Path(image))))

    messages = tuple(
        message.model_copy(update={"content": expand_images(message.content, list_pages)})
        for message in example.prompt_messages
    )
    contents = [message.content for message in messages]
    parts = [*itertools.chain(*contents, *example.answers)]
    boxes = [part for part in parts if isinstance(part, BoxPart)]
    if messages != example.prompt_messages and boxes:
        pages = [Path(part.image).name for part in parts if isinstance(part, ImagePart)]
        raise InvalidBoxError(
            f"a {boxes[0].type} in a document with several of {len(pages)} pages",
            expected=f"a path with the page, such as {pages[-1]}",
            remedy="name the page, or select one with --pages",
        )
    return replace(example, prompt_messages=messages)


NOTE_REPLACED_PROMPT = "prompts replaced"


def _replace_prompt(example: ImportExample, text: str, context: ImportContext) -> ImportExample:
    """Replace the texts of the question of an example by one text; images keep their place.

    The text stands in the place of the last text that is not blank, or after the images.

    Raises:
        InvalidRowError: The example has several turns, or a box in its question.
    """
    *system, question = example.prompt_messages
    num_turns = sum(message.role != "system" for message in example.prompt_messages)
    if num_turns != 1 or question.role != "user":
        raise InvalidRowError(
            f"a conversation of {num_turns + 1} turns",
            "one question and one answer, whose prompt can be replaced",
            "import conversations without --replace-prompts",
        )
    if any(isinstance(part, BoxPart) for part in question.content):
        raise InvalidRowError(
            "a question with a box",
            "a question of text and images, whose text can be replaced",
            "import such questions without --replace-prompts",
        )
    content = list(question.content)
    texts = [index for index, part in enumerate(content) if isinstance(part, TextPart)]
    filled = [index for index in texts if join_text([content[index]]).strip()]
    position = next(iter(reversed(filled or texts)), len(content))
    parts: list[ContentPart] = []
    for index, part in enumerate(content):
        if index == position and text:
            parts.append(TextPart(text=text))
        elif not isinstance(part, TextPart):
            parts.append(part)
    if position == len(content) and text:
        parts.append(TextPart(text=text))
    if parts == content:
        return example
    if not parts:
        raise InvalidRowError(
            "a question without an image, whose text is replaced by an empty one",
            "a question with an image",
            "give --replace-prompts a text",
        )
    context.row_notes[NOTE_REPLACED_PROMPT] += 1
    message = question.model_copy(update={"content": tuple(parts)})
    return replace(example, prompt_messages=(*system, message))


def join_leading_media(text: str) -> str:
    """Remove the line breaks after placeholders at the start of a text.

    Each model family adds its own. Breaks after other placeholders separate lines of the text.
    """
    match = _LEADING_MEDIA.match(text)
    if match is None:
        return text
    return match[0].replace("\n", "") + text[match.end() :]


def split_at_pattern(text: str, pattern: re.Pattern[str]) -> Iterator[str | re.Match[str]]:
    """Split a text at a regular expression.

    Yields the non-empty texts between matches, and the matches, in order.
    """
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()]
        yield match
        end = match.end()
    if end < len(text):
        yield text[end:]


def make_text_part(text: str) -> TextPart:
    """Create a text part from a text without placeholders.

    Raises:
        UnexpectedPlaceholderError: The text contains an image or box placeholder of another format.
    """
    match = _PLACEHOLDERS.search(text) if "<" in text else None
    if match:
        raise UnexpectedPlaceholderError(
            f"the placeholder {match[0]!r} in the text {text[:60]!r}",
            expected="text without placeholders: images and boxes are separate parts",
            remedy="remove it from the text, or write the image or the box as its format requires",
        )
    return TextPart(text=text)


def check_image_order(placeholders: Sequence[str], num_images: int, text: str) -> None:
    """Check that numbered placeholders, if any, count all images from 0 or 1.

    Raises:
        InvalidRowError: The numbers are others, or the text has placeholders without numbers, too.
    """
    if not placeholders:
        return
    numbers = [int(re.sub(r"\D", "", placeholder)) for placeholder in placeholders]
    first = min(numbers[0], 1)
    is_ordered = numbers == list(range(first, first + num_images))
    if is_ordered and "<image>" not in text:
        return
    raise InvalidRowError(
        f"the placeholders {', '.join(placeholders[:9])} of {num_images} images in the text"
        f" {text[:60]!r}",
        "a placeholder for each image, numbered in the order of the text from 1 or 0",
        "write `<image>` for each image, and order the images as in the text; or remove the"
        " placeholders, to put the images first",
    )


def strip_object_refs(text: str) -> TextPart:
    """Create a text part, and replace object references of Qwen2-VL by the text they contain.

    Raises:
        UnexpectedPlaceholderError: The text contains an image or box placeholder of another format.
    """
    return make_text_part(_OBJECT_REF.sub(r"\1", text) if "<" in text else text)


def merge_text_parts(parts: Iterable[ContentPart]) -> tuple[ContentPart, ...]:
    """Merge adjacent text parts of a message into one part."""
    merged_parts: list[ContentPart] = []
    for _, group in itertools.groupby(parts, key=attrgetter("type")):
        run = list(group)
        texts = [part.text for part in run if isinstance(part, TextPart)]
        merged_parts += [TextPart(text="".join(texts))] if len(texts) > 1 else run
    return tuple(merged_parts)


def as_list(value: object) -> list[object]:
    """Wrap a single value in a list; None becomes an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
