"""Interface of model families: prompt pieces, box types, JSON boxes and defaults of Qwen2-VL.

The JSON box format of Qwen2.5-VL and Qwen3-VL is `{"bbox_2d": [x1, y1, x2, y2], "label": ...}`, and
`{"point_2d": [x, y], "label": ...}` for points; the coordinate frame depends on the family.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.samples.boxes import (
    BOX_KEY,
    POINT_KEY,
    find_coordinates,
    iter_json_boxes,
    iter_json_values,
)
from finesight.samples.frames import (
    FRAME_1000,
    Box,
    ImageSize,
    ImageSizes,
    Order,
    rescale,
    round_to_size,
    to_corners,
)
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    Message,
    TextPart,
    ToolCallPart,
    create_region,
)

MIN_SAMPLED_FRAMES = 4
"""Minimum number of frames of a video file, as in the published video processors."""

MAX_SAMPLED_FRAMES = 768
"""Maximum number of frames of a video file, as in the published video processors."""

_TOOLS_PREFIX = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_SUFFIX = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments"
    " within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

THINK_START = "<think>\n"
THINK_END = "\n</think>\n\n"

QWEN_VL_MAX_COORDINATE = 999
"""Largest box coordinate of Qwen-VL, whose boxes are in thousandths of the image size."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token of a prompt, given by its text, for example `<|im_end|>`.

    Strings in a prompt are always tokenized as text, even if they contain a special token.
    """

    token: str


PromptPiece = str | SpecialToken


@dataclass(frozen=True, slots=True)
class VisualMarkers:
    """Prompt pieces around an image or video, and the placeholder token of its features."""

    prefix: tuple[PromptPiece, ...]
    placeholder: str
    suffix: tuple[PromptPiece, ...]


@dataclass(frozen=True, slots=True)
class VideoSegment:
    """Consecutive frames of a video that the prompt contains as one unit.

    Attributes:
        timestamp_text: Text before the frames; empty without a timestamp.
    """

    timestamp_text: str
    frame_slice: slice
    seconds_per_grid: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingOptions:
    """Thinking mode and reasoning effort of a prompt; None selects the default of the model."""

    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


DEFAULT_THINKING = ThinkingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily(ABC):
    """Family-specific parts of prompt rendering and answer parsing, with defaults of Qwen2-VL.

    Attributes:
        name: `model_type` of config.json.
        system_prompt: System prompt of the published chat template; None if it has no system turn.
        has_reasoning: Whether the model generates reasoning before its answer.
        uses_1d_positions: Whether the decoder uses 1D position ids instead of M-RoPE.
        strips_content: Whether the template strips whitespace around the content of a turn.
        strips_answer: Whether it also strips whitespace between reasoning and answer.
        splits_role_tokens: Whether role name, newline and content of a turn are tokenized
            separately.
        box_tokens: Special tokens around the label and around the coordinates of a box, for
            structured output; None for JSON boxes.
        calls_are_xml: Whether tool calls are XML, else JSON.
        call_separator: Text between the content of a turn and its tool calls.
        limits_video_pixels: Whether the pixel limits of the video processor apply to all frames of
            a video file together.
        token_id_keys: Keys of config.json (dotted paths) with the ids of special tokens, by token.
            The renderer checks that these ids match the tokenizer.
    """

    name: str
    system_prompt: str | None = "You are a helpful assistant."
    has_reasoning: bool = False
    reasoning_effort: str | None = None
    strips_answer: bool = False
    has_thinking_modes: ClassVar[bool] = False
    uses_1d_positions: ClassVar[bool] = False
    strips_content: ClassVar[bool] = False
    splits_role_tokens: ClassVar[bool] = False
    box_tokens: ClassVar[Sequence[str] | None] = None
    call_separator: ClassVar[str] = "\n"
    calls_are_xml: ClassVar[bool] = False
    max_box_coordinate: ClassVar[int] = 1000
    limits_video_pixels: ClassVar[bool] = False
    token_id_keys: ClassVar[Mapping[str, str]] = {
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
    }

    @property
    def reasoning_efforts(self) -> tuple[str, ...]:
        """Values of the reasoning effort that the template defines."""
        return ()

    def with_thinking(self, options: ThinkingOptions) -> Self:
        """Return the family in a thinking mode; a reasoning effort implies thinking.

        The effort `none` of the OpenAI API selects non-thinking mode.

        Raises:
            UserError: The template does not define this mode or reasoning effort.
        """
        has_reasoning = options.enable_thinking
        effort = options.reasoning_effort
        if effort == "none" and not has_reasoning:
            has_reasoning = False
            effort = None
        if effort is not None and effort not in self.reasoning_efforts:
            expected = "no value: the chat template of the model has no reasoning effort"
            remedy = "omit it"
            if self.reasoning_efforts:
                expected = ", ".join(self.reasoning_efforts)
                remedy = "choose one of these"
            raise UserError(
                f"reasoning effort {effort!r:.80} for a model of the family {self.name}",
                where="reasoning_effort",
                expected=expected,
                remedy=remedy,
            )
        if effort is not None and has_reasoning is False:
            raise UserError(
                f"reasoning effort {effort} in non-thinking mode",
                where="reasoning_effort",
                expected="a reasoning effort in thinking mode only",
                remedy="omit it, or enable thinking",
            )
        if has_reasoning is None:
            has_reasoning = self.has_reasoning or effort is not None
        if has_reasoning != self.has_reasoning and not self.has_thinking_modes:
            modes = ("non-thinking", "thinking")
            raise UserError(
                f"{modes[has_reasoning]} mode for a model of the family {self.name}",
                where="thinking",
                expected=f"{modes[self.has_reasoning]} mode, the only mode of this model",
                remedy="omit the mode, or use a model with both modes, such as Qwen3.5",
            )
        return replace(
            self, has_reasoning=has_reasoning, reasoning_effort=effort or self.reasoning_effort
        )

    @property
    def renders_reasoning(self) -> bool:
        """True if the template separates the reasoning of assistant turns from their answers."""
        return self.has_reasoning

    @property
    def supervises_empty_reasoning(self) -> bool:
        """True if an answer without reasoning is trained to end its empty reasoning section."""
        return True

    @property
    def generation_prompt(self) -> str:
        """Text after the header of the answer to generate."""
        return THINK_START if self.has_reasoning else ""

    def keeps_reasoning(
        self, messages: Sequence[Message], index: int, *, has_reasoning: bool
    ) -> bool:
        """Return whether the template renders a reasoning section in an assistant turn.

        By default, these are the last turn, and turns with reasoning after the last question.
        """
        is_last = index == len(messages) - 1
        return is_last or (has_reasoning and not any(map(is_question, messages[index:])))

    def format_messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Apply the changes of the template to the content of turns; none by default."""
        return messages

    def write_tools(
        self, tools: Sequence[dict[str, Any]], system: Sequence[ContentPart]
    ) -> Sequence[ContentPart]:
        """Return the content of a system turn, followed by the definitions of tools.

        The format is that of Qwen3-VL, which Qwen2.5 introduced (Hermes).
        """
        text = f"{_TOOLS_PREFIX}{format_definitions(tools)}{_TOOLS_SUFFIX}"
        if not system:
            return (TextPart(text=text),)
        return *system, TextPart(text="\n\n"), TextPart(text=text)

    def write_tool_call(self, call: ToolCallPart) -> str:
        """Return the text of a tool call with its tags."""
        return call.to_text()

    def format_tools(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Sequence[Message]:
        """Replace definitions, calls and results of tools by their text in the template.

        Consecutive results become one user turn.
        """
        if tools:
            messages = self._add_tool_definitions(messages, tools)
        formatted: list[Message] = []
        for index, message in enumerate(messages):
            content = message.content
            if message.role == "tool":
                content = self._format_tool_result(content)
                if messages[index - 1].role == "tool":
                    content = *formatted.pop().content, TextPart(text="\n"), *content
                message = Message.model_construct(role="user", content=content)
            elif any(part.type == "tool_call" for part in content):
                message = message.model_copy(update={"content": self._format_calls(content)})
            formatted.append(message)
        return formatted

    def _add_tool_definitions(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Sequence[Message]:
        """Return the turns with definitions of tools in the system turn."""
        system_content: Sequence[ContentPart] = ()
        others = messages
        if messages[0].role == "system":
            system_content = messages[0].content
            others = messages[1:]
        content = tuple(self.write_tools(tools, system_content))
        return Message.model_construct(role="system", content=content), *others

    def _format_tool_result(self, content: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
        """Return the content of a turn with the result of a tool, between its tags."""
        if self.strips_content:
            content = strip_content(content)
        start = TextPart(text="<tool_response>\n")
        end = TextPart(text="\n</tool_response>")
        return start, *content, end

    def _format_calls(self, content: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
        """Return the content of an assistant turn, followed by the text of its tool calls."""
        calls: list[str] = []
        others: list[ContentPart] = []
        for part in content:
            if isinstance(part, ToolCallPart):
                calls.append(self.write_tool_call(part))
            else:
                others.append(part)
        if self.strips_content:
            others = list(strip_content(others))
        answer = "".join(part.text if isinstance(part, TextPart) else part.type for part in others)
        if self.renders_reasoning:
            answer = answer.rpartition("</think>")[2].strip("\n")
        separator = self.call_separator if answer else ""
        return *others, TextPart(text=separator + "\n".join(calls))

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the tokens around an image or video with its 1-based number in the sample."""
        start = SpecialToken("<|vision_start|>")
        end = SpecialToken("<|vision_end|>")
        return VisualMarkers((start,), f"<|{kind}_pad|>", (end,))

    def sample_frames(
        self, num_frames: int, video_fps: float, fps: float, temporal_patch_size: int
    ) -> list[int]:
        """Return the indices of the frames to use of a video file, `fps` per second.

        Their number is rounded down to complete frame groups, as in the video processor of
        Qwen2-VL.
        """
        max_frames = min(MAX_SAMPLED_FRAMES, num_frames) // temporal_patch_size
        wanted = max(num_frames / video_fps * fps, MIN_SAMPLED_FRAMES) // temporal_patch_size
        count = max(int(min(wanted, max_frames)) * temporal_patch_size, 1)
        return [index * num_frames // count for index in range(count)]

    def split_video(
        self, frame_times: Sequence[float], fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Split a video into the segments that the prompt contains separately: by default one.

        Args:
            fps: Average number of frames per second.
            temporal_patch_size: Number of frames per frame group.
        """
        return [VideoSegment("", slice(0, len(frame_times)), temporal_patch_size / fps)]

    def box_frame(self, resized_size: ImageSize) -> ImageSize:
        """Return the frame of JSON boxes, by default in thousandths of the image size."""
        return FRAME_1000

    def write_boxes(
        self, boxes: Sequence[BoxPart], images: Sequence[ImageSizes]
    ) -> list[PromptPiece]:
        """Format one or more adjacent boxes in the box format of the family.

        By default, one box is a JSON object and several are a list, with integer coordinates.

        Args:
            boxes: Boxes whose `BoxPart.image` the caller has checked to be an index in `images`.
            images: Sizes of the images of the sample.
        """
        items: list[dict[str, Any]] = []
        for box in boxes:
            key = POINT_KEY if box.is_point else BOX_KEY
            item: dict[str, Any] = {key: self._round_corners(box, images)}
            if box.label is not None:
                item["label"] = box.label
            items.append(item)
        if len(items) == 1:
            return [json.dumps(items[0], ensure_ascii=False)]
        return [json.dumps(items, ensure_ascii=False)]

    def write_coordinates(self, box: BoxPart, images: Sequence[ImageSizes]) -> list[PromptPiece]:
        """Format a box as a JSON value: a list of numbers, or a string with special tokens."""
        if self.box_tokens:
            unlabeled = box.model_copy(update={"label": None})
            return ['"', *self.write_boxes([unlabeled], images), '"']
        return [json.dumps(self._round_corners(box, images))]

    def _round_corners(self, box: BoxPart, images: Sequence[ImageSizes]) -> tuple[int, ...]:
        image = images[box.image]
        frame = self.box_frame(image.resized)
        corners = round_to_size(rescale(box.xyxy, image.original, frame), frame)
        return corners[:2] if box.is_point else corners

    def write_segments(
        self, segments: Sequence[str | list[BoxPart]], images: Sequence[ImageSizes]
    ) -> list[PromptPiece]:
        """Format texts and lists of adjacent boxes.

        A box after a key of coordinates in JSON is only their value. Other boxes within a string of
        JSON text are escaped, or replace the string if they are JSON and its only content.
        """
        slots = {n for n in find_coordinates(segments) if len(segments[n]) == 1}
        pieces: list[list[PromptPiece]] = []
        for index, segment in enumerate(segments):
            if isinstance(segment, str):
                pieces.append([segment])
            elif index in slots:
                pieces.append(self.write_coordinates(segment[0], images))
            else:
                pieces.append(self.write_boxes(segment, images))
        for index in _find_boxes_in_json_strings(segments, slots):
            before = str(pieces[index - 1][0])
            after = str(pieces[index + 1][0])
            is_whole_string = before[-1:] == after[:1] == '"' and before[-2:-1] != "\\"
            is_key = after[1:].lstrip()[:1] == ":"
            if is_whole_string and not is_key and not self.box_tokens:
                pieces[index - 1] = [before[:-1]]
                pieces[index + 1] = [after[1:]]
            else:
                pieces[index] = [_escape_in_json(piece) for piece in pieces[index]]
        return list(itertools.chain.from_iterable(pieces))

    def read_boxes(
        self, text: str, original_size: ImageSize, resized_size: ImageSize
    ) -> list[BoxPart]:
        """Parse the boxes of a generated answer, in pixels of the original image.

        Args:
            text: Answer, including its special tokens.
            resized_size: Size of the resized image that the model received.
        """
        return read_json_boxes(text, self.box_frame(resized_size), original_size)

    @abstractmethod
    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return the temporal position id of each frame group of a video, starting at 0.

        Args:
            grid_t: Number of frame groups (patches along time).
            seconds_per_grid: Time between consecutive frame groups.
        """


def _escape_in_json(piece: PromptPiece) -> PromptPiece:
    """Escape a text for use within a string of JSON."""
    if isinstance(piece, SpecialToken):
        return piece
    return json.dumps(piece, ensure_ascii=False)[1:-1]


def format_definitions(tools: Sequence[dict[str, Any]]) -> str:
    """Format one line of JSON per tool, each after a newline."""
    return "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)


def merge_text_parts(content: Sequence[ContentPart]) -> list[ContentPart]:
    """Join adjacent text parts, because a template sees the content of a turn as one text."""
    merged: list[ContentPart] = []
    for part in content:
        last = merged[-1] if merged else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            merged[-1] = TextPart(text=last.text + part.text)
        else:
            merged.append(part)
    return merged


def strip_content(content: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
    """Remove whitespace at both ends of the content of a turn, across adjacent text parts."""
    parts = merge_text_parts(content)
    if parts and isinstance(first := parts[0], TextPart):
        parts[0] = TextPart(text=first.text.lstrip())
    if parts and isinstance(last := parts[-1], TextPart):
        parts[-1] = TextPart(text=last.text.rstrip())
    return tuple(part for part in parts if not isinstance(part, TextPart) or part.text)


def is_question(message: Message) -> bool:
    """Return whether a turn is a user turn other than tool responses."""
    parts = merge_text_parts(message.content)
    is_tool_response = (
        bool(parts)
        and isinstance(first := parts[0], TextPart)
        and first.text.startswith("<tool_response>")
        and isinstance(last := parts[-1], TextPart)
        and last.text.endswith("</tool_response>")
    )
    return message.role == "user" and not is_tool_response


def _find_boxes_in_json_strings(
    segments: Sequence[str | list[BoxPart]], slots: Collection[int]
) -> list[int]:
    """Return the indices of the boxes within strings of JSON: a mark elsewhere is invalid JSON."""
    texts: list[str] = []
    box_ends: dict[int, int] = {}
    end = 0
    for index, segment in enumerate(segments):
        if isinstance(segment, str):
            texts.append(segment)
        elif index in slots:
            texts.append("0")
        else:
            texts.append("?")
            box_ends[index] = end + 1
        end += len(texts[-1])
    # A box within a string is between two texts.
    if not box_ends or len(segments) <= 2:
        return []
    regions = list(iter_json_values("".join(texts)))
    found = []
    for index, box_end in box_ends.items():
        if any(region.start < box_end < region.stop for region in regions):
            found.append(index)
    return found


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR_VALUES = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_ONLY_VALUES = re.compile(r"(?:```(?:json)?)?[\s\d\[\],.-]*+(?:```\s*)?")


def read_json_boxes(
    text: str, frame: ImageSize, original_size: ImageSize, order: Order = "xyxy"
) -> list[BoxPart]:
    """Parse the boxes of an answer and scale them from `frame` to the original image.

    Accepts text and code fences around the JSON, truncated lists, missing labels and fractions.
    Without any JSON box, four values in brackets count as a box if the answer contains only digits
    or mentions a bbox.
    """
    # Parse single objects: the surrounding list may be truncated.
    objects = [found.value for found in iter_json_values(text, "{")]
    parsed = [(box.label, box.coordinates) for box in iter_json_boxes(objects)]
    if not parsed and ("bbox" in text or _ONLY_VALUES.fullmatch(text)):
        parsed = [(None, match.groups()) for match in _FOUR_VALUES.finditer(text)]
    regions = []
    for label, coordinates in parsed:
        corners = parse_corners(coordinates)
        if corners is None:
            continue
        scaled = rescale(to_corners(order, corners), frame, original_size)
        regions.append(create_region(scaled, label, is_point=len(coordinates) == 2))
    return regions


def parse_corners(values: Any) -> Box | None:
    """Convert four finite values, or the two of a point, to box corners; None for other input."""
    if not isinstance(values, list | tuple) or len(values) not in (2, 4):
        return None
    try:
        # Both corners of a point are equal.
        x1, y1, x2, y2 = map(float, (*values, *values)[:4])
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    return x1, y1, x2, y2
