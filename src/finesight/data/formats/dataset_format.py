"""Interface of dataset formats, and the state of an import or export that they share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from finesight.data.boxes import (
    Box,
    BoxConvention,
    BoxFormat,
    BoxUnits,
    InvalidBoxError,
    clip_to_image,
    parse_coordinates,
)
from finesight.data.image_resolver import ImageResolver
from finesight.data.row_reader import Record, RowReader, SourceRow
from finesight.data.sample import (
    MAX_BOXES,
    VIDEO_SUFFIXES,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    InvalidTurnsError,
    LocatedSample,
    Message,
    Role,
    Sample,
    TextPart,
    VideoPart,
    check_limit,
    is_video_path,
)
from finesight.errors import UserError


@dataclass(frozen=True, slots=True)
class ImportExample:
    """A question of a dataset row with all its correct answers.

    Attributes:
        references: Further correct answers that are used only for scoring.
    """

    id: str
    prompt_messages: tuple[Message, ...]
    answers: tuple[tuple[ContentPart, ...], ...]
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def to_train_samples(self) -> list[Sample]:
        """Return one training sample per correct answer."""
        if len(self.answers) == 1:
            return [self._build_sample(self.id, self.answers[0], self.references)]
        return [
            self._build_sample(format_answer_id(self.id, answer_number), answer, self.references)
            for answer_number, answer in enumerate(self.answers, start=1)
        ]

    def to_eval_sample(self) -> Sample:
        """Return an evaluation sample with the first answer, and the others as references."""
        answer, *other_answers = self.answers
        references = (
            *(join_text(answer).rstrip("\n") for answer in other_answers),
            *self.references,
        )
        return self._build_sample(self.id, answer, references)

    def _build_sample(
        self, sample_id: str, answer: tuple[ContentPart, ...], references: tuple[str, ...]
    ) -> Sample:
        last = Message(role="assistant", content=answer)
        messages = (*self.prompt_messages, last)
        return Sample(id=sample_id, messages=messages, references=references, meta=self.meta)


def format_answer_id(name: str, number: int) -> str:
    """Return the sample ID of one answer (1-based) to a question with several answers."""
    return f"{name}-{number}"


def build_example(
    sample_id: str, messages: Sequence[tuple[Role, tuple[ContentPart, ...]]], meta: dict[str, Any]
) -> ImportExample:
    """Build an example from messages whose last message is the only answer.

    Raises:
        InvalidTurnsError: The last message is not from the assistant.
    """
    if not messages or messages[-1][0] != "assistant":
        raise InvalidTurnsError(
            f"{len(messages)} messages without an answer at the end",
            expected="an assistant message at the end",
            remedy="add the answer, or remove the row",
        )
    turns = tuple(Message(role=role, content=content) for role, content in messages[:-1])
    return ImportExample(sample_id, turns, (messages[-1][1],), meta=meta)


def join_text(content: tuple[ContentPart, ...]) -> str:
    """Return the concatenated text parts of a message, without images and boxes."""
    return "".join(part.text for part in content if isinstance(part, TextPart))


BoxTask = Literal["detection", "grounding"]
"""Task of a box dataset: one question per image, or one per label."""

IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")
UNSUPPORTED_KEYS = frozenset(
    {
        *(*VIDEO_KEYS, "audio", "audios"),
        *("tools", "objects", "history", "kto_tag"),
        *("chosen", "rejected", "rejected_response", "rejected_messages"),
    }
)
"""Keys of conversation records with content that an import cannot represent.

They contain other media, tools, boxes, earlier turns, or rejected answers. A format that supports
one of them exempts it.
"""

_VIDEO_REMEDY = (
    "write these rows as samples (--format samples) with the content part"
    ' {"type": "video", "video": "clip.mp4"} or a list of frames; see "Videos" on the page "Data"'
    " of the documentation"
)

_PLACEHOLDERS = re.compile(
    r"<\|(?:vision|image|video|box|object_ref)_\w+\|>|<img>|<(?:box|quad)>\s*\("
    r"|<image>|<bbox>|<ref-object>"
)


class UnexpectedPlaceholderError(UserError):
    """Raised when a text contains an image or box placeholder of another format."""


class InvalidOptionError(UserError):
    """Raised when an import option does not apply to the source.

    It ends the import, in contrast to errors of single rows.
    """


class PlaceholderCountError(UserError):
    """Raised when the numbers of image placeholders and images in a row differ."""


class UnsupportedKeyError(UserError):
    """Raised when a row has a key with content that the import cannot represent."""


@dataclass(frozen=True, slots=True)
class RawBox:
    """A box with its coordinates as stored in the source, and their declared convention."""

    coordinates: Box
    image_path: Path
    convention: BoxConvention
    label: str | None = None


_OBJECT_REF = re.compile(
    r"<\|object_ref_start\|>((?:(?!<\|object_ref_).)*)<\|object_ref_end\|>", re.DOTALL
)


@dataclass(slots=True)
class ImportContext:
    """State of one import that dataset formats use to parse rows.

    Attributes:
        prompt: Question or prompt template from the user; None uses the default.
        box_format: Box format from the user; None uses the default of the dataset format.
        box_units: Box units from the user; None uses the default of the dataset format.
        box_task: Whether box datasets become detection or grounding questions.
        lenient: Accept every box unchanged, for data checks.
        raw_boxes: Boxes of the current row with coordinates as stored in the source.
        num_clipped: Number of boxes that exceeded their image by a rounding error.
    """

    images: ImageResolver
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    box_task: BoxTask = "detection"
    lenient: bool = False
    raw_boxes: list[RawBox] = field(default_factory=list)
    num_clipped: int = 0
    source_notes: Counter[str] = field(default_factory=Counter)
    skipped_rows: Counter[str] = field(default_factory=Counter)

    def resolve_convention(self, default: BoxConvention) -> BoxConvention:
        """Return the box convention of the user options, else that of the dataset format."""
        if self.box_format is None and self.box_units is None:
            return default
        return replace(
            default, format=self.box_format or default.format, units=self.box_units or default.units
        )

    def read_box(
        self, value: object, image_path: Path, default: BoxConvention, label: str | None = None
    ) -> Box:
        """Convert four coordinates of a row to two corners in pixels inside the image.

        Raises:
            InvalidBoxError: The value is not a box, or the box is not inside the image; see
                `clip_to_image`. A lenient import accepts a box outside the image.
        """
        convention = self.resolve_convention(default)
        a, b, c, d = parse_coordinates(value)
        self.raw_boxes.append(RawBox((a, b, c, d), image_path, convention, label))
        if self.lenient and convention.units == "pixel":
            return convention.to_pixels((a, b, c, d), (0, 0))
        image_size = self.images.image_size(image_path)
        pixel_box = convention.to_pixels((a, b, c, d), image_size)
        if self.lenient:
            return pixel_box
        clipped_box = clip_to_image(pixel_box, image_size, convention)
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
        if parts and isinstance(parts[-1], TextPart):
            return (*parts[:-1], TextPart(text=f"{parts[-1].text}\n{self.prompt}"))
        return (*parts, TextPart(text=self.prompt))


class RowImages:
    """Images of one dataset row in order of appearance, to which boxes refer by index."""

    def __init__(self, context: ImportContext) -> None:
        self._context = context
        self._boxes = 0
        self.paths: list[Path] = []

    def add_image(self, value: object) -> ImagePart:
        """Resolve an image of the row and return its image part.

        The value is a path, a URL or embedded bytes; see `ImageResolver.resolve`.
        """
        self.paths.append(self._context.images.resolve(value))
        return ImagePart(image=str(self.paths[-1]))

    def add_video(self, value: object) -> VideoPart:
        """Resolve the path of a video file, and return its video part."""
        if not isinstance(value, str) or not is_video_path(value.strip()):
            raise InvalidRowError(
                f"a video given as {str(value)[:60]!r}",
                f"the path of a file with one of the suffixes {', '.join(VIDEO_SUFFIXES)}",
                _VIDEO_REMEDY,
            )
        return VideoPart(video=str(self._context.images.resolve(value)))

    def create_box(
        self,
        value: object,
        label: str | None,
        default: BoxConvention,
        image_index: int | None = None,
    ) -> BoxPart:
        """Create a box part from four coordinates.

        Args:
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
                expected=f"an index below {len(self.paths)}, the images before it",
                remedy="correct the row",
            )
        xyxy = self._context.read_box(value, self.paths[resolved_index], default, label)
        return BoxPart(image=resolved_index, label=label, xyxy=xyxy)

    def require_single_image(self) -> None:
        """Raise UserError unless the row has exactly one image, to which all boxes belong."""
        if len(self.paths) != 1:
            raise UserError(
                f"boxes in a row with {len(self.paths)} images",
                expected="one image, so that the image of each box is unambiguous",
                remedy="write the rows as samples, where each box has an image index",
            )


@dataclass(slots=True)
class ExportContext:
    """State of one export that dataset formats use to write files.

    Attributes:
        image_names: Path relative to the output folder, by absolute image path.
    """

    image_names: Mapping[Path, str]
    read_size: Callable[[Path], tuple[int, int]]
    lost_counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def image_name(self, path: Path) -> str:
        """Return the path of an image relative to the output folder."""
        return self.image_names[path]

    def image_size(self, path: Path) -> tuple[int, int]:
        """Return height and width of an image in pixels after EXIF rotation.

        Raises:
            CorruptImageError: The image is unreadable.
        """
        return self.read_size(path)


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """A dataset format: how to detect, parse and write it.

    Attributes:
        detect: Function that returns the reason why records match this format, or None. By
            default, a format is detected when its source is opened, or selected explicitly.
        supported_options: Supported import options: "map", "prompt", "boxes", "box_task".
        open_dataset: Function that opens sources other than row files, such as a folder or a COCO
            document. It returns the rows and the reason for the match, or None.
        open_requested: Function that replaces `open_dataset` if the user names the format. It
            raises UserError with the reason for a mismatch.
        map_columns: Function that returns the column of each role for tables with known columns,
            from the first record and the columns of `--map`.
        write_files: Function that yields relative file names with content; a repeated name appends.
            It raises UserError for a sample that the format cannot represent.
    """

    name: str
    description: str
    parse_row: Callable[[SourceRow, ImportContext], ImportExample | list[ImportExample]]
    typical_keys: frozenset[str] = frozenset()
    detect: Callable[[Sequence[Record]], str | None] = lambda records: None
    supported_options: frozenset[str] = frozenset()
    open_dataset: Callable[[Path], tuple[RowReader, str] | None] | None = None
    open_requested: Callable[[Path], tuple[RowReader, str] | None] | None = None
    map_columns: Callable[[Record, Mapping[str, str]], Mapping[str, str]] = lambda _, columns: (
        columns
    )
    write_files: (
        Callable[[Sequence[LocatedSample], ExportContext], Iterator[tuple[str, bytes]]] | None
    ) = None

    def parse_examples(self, row: SourceRow, context: ImportContext) -> list[ImportExample]:
        """Parse a row and return its examples as a list, which may be empty."""
        result = self.parse_row(row, context)
        return [result] if isinstance(result, ImportExample) else result


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


def strip_object_refs(text: str) -> TextPart:
    """Create a text part, and replace object references of Qwen2-VL by the text they contain.

    Raises:
        UnexpectedPlaceholderError: The text contains an image or box placeholder of another format.
    """
    return make_text_part(_OBJECT_REF.sub(r"\1", text) if "<" in text else text)


def merge_text_parts(parts: Iterable[ContentPart]) -> tuple[ContentPart, ...]:
    """Merge adjacent text parts of a message into one part."""
    merged_parts: list[ContentPart] = []
    run: list[TextPart] = []
    for part in parts:
        if part.type == "text":
            run.append(part)
            continue
        if run:
            merged_parts.append(_joined(run))
            run = []
        merged_parts.append(part)
    if run:
        merged_parts.append(_joined(run))
    return tuple(merged_parts)


def _joined(run: Sequence[TextPart]) -> TextPart:
    return run[0] if len(run) == 1 else TextPart(text="".join(part.text for part in run))


def reject_unsupported_keys(record: Record, keys: Iterable[str] = UNSUPPORTED_KEYS) -> None:
    """Raise UnsupportedKeyError if a record has a non-empty value under one of the given keys."""
    present_keys = sorted(key for key in keys if key in record and has_value(record[key]))
    if present_keys:
        key = present_keys[0]
        raise UnsupportedKeyError(
            f"the key {key!r} with {str(record[key])[:60]}",
            expected="a conversation of text, images and boxes",
            remedy=_VIDEO_REMEDY
            if key in VIDEO_KEYS
            else "write these rows as samples, or remove the key",
        )


def has_value(value: object) -> bool:
    """Return whether a value is not None and not an empty string, list or dictionary."""
    return value is not None and value != "" and value != [] and value != {}


def as_list(value: object) -> list[object]:
    """Wrap a single value in a list; None becomes an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
