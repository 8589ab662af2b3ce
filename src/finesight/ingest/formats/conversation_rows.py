"""Parse and write conversation rows: turns, boxes in answers, and metadata.

Qwen2.5-VL writes boxes in answers as JSON with `bbox_2d`, and points with `point_2d`: one object or
a list, in pixels of the original image. A ```json fence is removed, because each model family adds
its own. Qwen2-VL writes tags such as <|box_start|>(88,99),(500,700)<|box_end|> on a grid of 1000;
see `boxes` for the grammar. The options --box-format and --box-units override both conventions.
Boxes are parsed, because coordinates in text would be wrong after the image is resized.

In other JSON, each list of coordinates under `bbox_2d`, `point_2d` or `polygon_2d` becomes a part:

{"total": {"text": "12.50", "bbox_2d": [88, 99, 500, 700]}, "stamp": {"point_2d": [40, 60]}}
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import parse_unique_json
from finesight.ingest.formats.clip_bounds import check_clip_bounds
from finesight.ingest.formats.dataset_format import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    PlaceholderCountError,
    RowImages,
    as_list,
    build_example,
    describe_value,
    make_text_part,
    merge_text_parts,
    strip_object_refs,
)
from finesight.ingest.formats.row_keys import (
    ROWS,
    TURNS,
    find_meaning,
    has_value,
    is_loss_default,
    is_loss_key,
    sort_keys,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.boxes import (
    BOX_KEY,
    POINT_KEY,
    TextBox,
    has_json_boxes,
    split_at_boxes,
    split_at_text_boxes,
    strip_code_fences,
)
from finesight.samples.frames import PIXELS, BoxFrame, get_frame
from finesight.samples.image_file import is_image_value
from finesight.samples.sample import (
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    TOOL_CALL_END,
    TOOL_CALL_TEXT,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Message,
    Role,
    Sample,
    TextPart,
    ToolCallPart,
    VideoPart,
    check_limit,
    check_tool,
    find_box_slots,
    find_tool_calls,
    join_text,
    list_coordinates,
    list_media_paths,
    parse_tool_call,
    remove_nulls,
)

TextTurn = tuple[Role, str]

JSONL_FILE = "data.jsonl"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer whose text becomes its `<think>` section."""

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS = ("from", "role")
_CALL_ROLES = re.compile("(?:tool|function)_?calls?")
_RESULT_ROLES = re.compile("tool.*|function.*|observation|ipython")
CALL_KEYS = ("tool_calls", "function_call")
_CALL_PART_KEYS = {"id", "type", "index", "function", "name", "arguments"}
_USED_KEYS = {"assistant": CALL_KEYS, "tool": ("tool_call_id", "name")}
_TOOL_KEYS = ("tools", "functions")
"""Keys of a row with the definitions of tools: a list, also as JSON text."""

_TOOLS_IN_PROMPT = re.compile(
    r"# Tools\n\nYou [^<]*<tools></tools>[^<]*<tools>\n(?P<json>.*)\n</tools>.*\n</tool_call>"
    r"|# Tools\n\nYou [^<]*<tools>\n(?P<xml>.*)\n</tools>.*\n</IMPORTANT>",
    re.DOTALL,
)
"""Definitions of tools in a system prompt, as in the chat templates of Qwen."""

_REASONING = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)
"""Reasoning before the call of a tool in the same text."""

_BOX_TAG = re.compile(r"<box>\s*[\[(]|<\|box_start\|>")

_RESULT_TEXT = re.compile(r"(?s)(?:(?<!\s)\s++)?<tool_response>\n?(.*?)\n?</tool_response>\s*")

# Turns may also be pairs {"human": text, "assistant": text}; `history` is a list of such pairs.
_TURN_LISTS = (("messages",), ("conversations",), ("conversation",))
_TURN_PAIRS = (
    ("query", "response", "history"),
    ("instruction", "output", "input", "history"),
    ("prompt", "completion"),
)
"""Keys of a question and its answer, then those of further texts."""

_OBJECT_FRAMES = {"real": PIXELS, "norm1": get_frame("xyxy", "1")}
_OBJECT_KEYS = ("ref", "bbox", "bbox_type", "image_id")

TURN_KEYS = frozenset(("system", *itertools.chain(*_TURN_LISTS, *_TURN_PAIRS)))
RESERVED_KEYS = TURN_KEYS.union(("id", "label", "objects", *IMAGE_KEYS, *VIDEO_KEYS))
"""Metadata keys that are not exported, because a dataset format would read them as content."""


def parse_text(role: Role, text: str, images: RowImages) -> Iterable[ContentPart]:
    """Parse a text without image placeholders. Questions may contain boxes in tags only."""
    if role == "assistant":
        return parse_answer(text, images)
    if role == "user" and _BOX_TAG.search(text):
        return _parse_tagged_boxes(text, images)
    return [strip_object_refs(text)]


def _parse_tagged_boxes(question: str, images: RowImages) -> Iterator[ContentPart]:
    """Parse a question into text parts and the boxes in its tags."""
    images.require_single_image()
    for piece in split_at_text_boxes(question, None):
        if isinstance(piece, str):
            yield strip_object_refs(piece)
        else:
            yield images.create_text_box(piece)


def parse_answer(answer: str, images: RowImages) -> Iterator[ContentPart]:
    """Parse an answer text into text parts and box parts.

    Other notations than JSON and box tokens may follow one image.
    """
    found: Iterable[str | list[str | TextBox]] = filter(None, [answer])
    if has_json_boxes(answer):
        found = _iter_json_boxes(strip_code_fences(answer), keeps_json=images.context.keeps_json)
    for piece in found:
        pieces: Iterable[str | TextBox] = [piece] if isinstance(piece, str) else piece
        if isinstance(piece, str):
            if len(images.paths) == 1 or "<|box_start|>" in piece:
                images.require_single_image()
                pieces = split_at_text_boxes(piece, images.list_limits)
        elif len(images.paths) != 1 and isinstance(piece[0], str) and BOX_KEY not in str(piece):
            # Boxes need a single image. Without the key of a box, coordinates may be those of an
            # action, which is a valid answer about several images.
            texts = (one if isinstance(one, str) else json.dumps(one.coordinates) for one in piece)
            pieces = ["".join(texts)]
        else:
            images.require_single_image()
            images.context.num_json[isinstance(piece[0], str)] += 1
            if not isinstance(piece[0], str):
                pieces = []
                yield from images.create_boxes(one for one in piece if not isinstance(one, str))
        for one in pieces:
            yield strip_object_refs(one) if isinstance(one, str) else images.create_text_box(one)


def format_answer(content: Sequence[ContentPart], num_images: int) -> str:
    """Format text and box parts as text, with boxes as JSON in original pixels.

    `parse_answer` restores the same parts from the result. An answer has no other parts.
    """
    boxes = [part for part in content if isinstance(part, BoxPart)]
    texts = [part.text for part in content if isinstance(part, TextPart)]
    slots = find_box_slots(content)
    is_listed = [isinstance(part, BoxPart) and n not in slots for n, part in enumerate(content)]
    text = ""
    for is_list, group in itertools.groupby(zip(is_listed, content, strict=True), itemgetter(0)):
        parts = [part for _, part in group]
        text += _format_boxes(parts) if is_list else make_text_part(join_text(parts)).text
    values = ([one] if isinstance(one, str) else one for one in _iter_json_boxes(text))
    parsed = list(itertools.chain.from_iterable(values))
    found = [one for one in parsed if isinstance(one, TextBox)]
    if has_json_boxes(text) and (
        num_images != 1
        or "".join(one for one in parsed if isinstance(one, str)) != "".join(texts)
        or [one.coordinates for one in found] != list(map(list_coordinates, boxes))
        or (not slots and [one.label for one in found] != [box.label for box in boxes])
    ):
        raise UserError(
            f"boxes that are ambiguous with the surrounding text or their image: {text[:80]!r}",
            expected=f"boxes in one image, and no {BOX_KEY} or bracket in the adjacent text",
            remedy="export to samples or to ms-swift, or remove the sample",
        )
    return text


def _label_boxes(content: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
    """Set the labels of boxes in JSON to those in its text."""
    slots = sorted(find_box_slots(content))
    values = [piece for piece in split_at_boxes(join_text(content)) if isinstance(piece, list)]
    boxes = [one for value in values for one in value if isinstance(one, TextBox)]
    labels = dict(zip(slots, boxes, strict=True)) if len(boxes) == len(slots) else {}
    return tuple(
        part.model_copy(update={"label": labels[n].label}) if n in labels else part
        for n, part in enumerate(content)
    )


def _check_no_tools(sample: Sample) -> None:
    """Raise UserError if a sample has the call of a tool or its result."""
    parts = (*sample.iter_parts(), *sample.rejected)
    is_result = any(message.role == "tool" for message in sample.messages)
    if is_result or any(isinstance(part, ToolCallPart) for part in parts):
        what = "result of a tool call" if is_result else "tool call"
        raise UserError(
            f"the {what} in a sample of {len(sample.messages)} turns",
            expected="text and boxes",
            remedy="export to samples, openai, ms-swift or llama-factory, or remove the sample",
        )


def list_calls(message: Message) -> list[Record]:
    """Return name and arguments of the tool calls of an answer as JSON data."""
    calls = [part for part in message.content if isinstance(part, ToolCallPart)]
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def without_calls(message: Message) -> tuple[ContentPart, ...]:
    """Return the content of a turn without its tool calls."""
    return tuple(part for part in message.content if part.type != "tool_call")


def format_tools(sample: Sample) -> Record:
    """Return the definitions of the tools of a sample as JSON text under `tools`."""
    return {"tools": json.dumps(sample.tools, ensure_ascii=False)} if sample.tools else {}


def _format_boxes(boxes: Iterable[ContentPart]) -> str:
    items = [
        {POINT_KEY if box.is_point else BOX_KEY: list_coordinates(box)}
        | ({} if box.label is None else {"label": make_text_part(box.label).text})
        for box in boxes
        if isinstance(box, BoxPart)
    ]
    return json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)


_INVALID_KEY = re.compile(rf'{BOX_KEY}(?!"\s*:\s*\[*$)')
"""The key of a box in a text, unless a box follows the text."""


def _iter_json_boxes(text: str, *, keeps_json: bool = False) -> Iterator[str | list[str | TextBox]]:
    """Yield non-empty texts and JSON values with boxes, and reject malformed boxes."""
    for piece in split_at_boxes(text, keeps_json=keeps_json):
        if not isinstance(piece, str):
            check_limit(len(piece), MAX_BOXES, "boxes")
            yield piece
        elif _INVALID_KEY.search(piece):
            raise InvalidRowError(
                f"{BOX_KEY} outside of JSON in the answer {piece[:80]!r}",
                f'{{"{BOX_KEY}": [x1, y1, x2, y2]}} in valid JSON',
            )
        elif piece:
            yield piece


class Turn(NamedTuple):
    """A turn of a row: role, text or parts, tool calls, and whether training uses it.

    The first turn has the definitions of the tools of the row.
    """

    role: Role
    content: Any
    calls: tuple[ToolCallPart, ...] = ()
    loss: bool = True
    tools: tuple[Record, ...] = ()


class RowMedia(RowImages):
    """Images and videos of a row: those in its turns, and those of its lists of files.

    Args:
        num_marked: Number of placeholders in the turns by kind, `image` or `video`. Listed files
            without any placeholder precede the first question; None forbids such files.
    """

    def __init__(
        self, record: Record, context: ImportContext, num_marked: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(context)
        self.listed = {"image": list_images(record), "video": list_videos(record)}
        for kind, files in self.listed.items():
            check_limit(len(files), MAX_PARTS, f"{kind}s")
        used = (*IMAGE_KEYS, *VIDEO_KEYS)
        self._other_media = [k for k, v in record.items() if k not in used and is_image_value(v)]
        self._num_marked = num_marked
        self._placed: dict[str, set[int]] = {kind: set() for kind in self.listed}
        self._order = {kind: iter(range(len(files))) for kind, files in self.listed.items()}

    def add(self, kind: str, value: object = None, index: object = None) -> ImagePart | VideoPart:
        """Return the part of an image or video, by default of the next listed one.

        Args:
            value: A file that the turn names.
            index: 0-based index of a listed file.
        """
        files, placed = self.listed[kind], self._placed[kind]
        if value is not None:
            placed.update(number for number, file in enumerate(files) if file == value)
        else:
            if index is None:
                index = next((number for number in self._order[kind] if number not in placed), None)
            if not isinstance(index, int) or not 0 <= index < len(files):
                article = "an" if kind == "image" else "a"
                number = "" if index is None else f" of the index {index!r}"
                num_listed = format_count(len(files), kind)
                remedy = f"add the {kind}, or remove the placeholder"
                if self._other_media:
                    name = self._other_media[0]
                    remedy = f"the row has files under {name!r}, which is no key of this format:"
                    remedy += " rename it to `images`, or to `videos` for the frames of a video"
                raise PlaceholderCountError(
                    f"a placeholder without {article} {kind}{number}: {num_listed} listed",
                    expected=f"{article} {kind} under `{kind}s` per placeholder, or a path in it",
                    remedy=remedy,
                )
            placed.add(index)
            value = files[index]
        return self.add_image(value) if kind == "image" else self.add_video(value)

    def place_unmarked(self) -> list[ContentPart]:
        """Return the parts of listed files for which no turn has a placeholder."""
        marked = self._num_marked
        kinds = [] if marked is None else [kind for kind in self.listed if not marked.get(kind)]
        return [self.add(kind) for kind in kinds for _ in self.listed[kind]]

    def require_all_placed(self) -> None:
        """Raise PlaceholderCountError if a listed file is in no turn."""
        for kind, files in self.listed.items():
            num_remaining = len(files) - len(self._placed[kind])
            if num_remaining:
                raise PlaceholderCountError(
                    f"{len(files)} {kind}s are listed, {num_remaining} of them have no"
                    f" `<{kind}>` in the text and no part",
                    expected=f"one placeholder per {kind}",
                    remedy=f"write `<{kind}>` into the question about it, or remove the {kind}",
                )


@dataclass(slots=True)
class ObjectQueue:
    """References and boxes of a row in the order of their placeholders in the text."""

    refs: Iterator[object]
    boxes: Iterator[tuple[object, int]]
    frame: BoxFrame

    @classmethod
    def from_value(cls, value: object, context: ImportContext) -> ObjectQueue:
        """Build the queue from the value of the key `objects` of a row."""
        objects: dict[str, Any] = value if isinstance(value, dict) else {}
        bbox_type = objects.get("bbox_type") or "real"
        unknown = objects.keys() - {*_OBJECT_KEYS, "width", "height"}
        is_known = isinstance(bbox_type, str) and bbox_type in _OBJECT_FRAMES
        if unknown or not is_known or (has_value(value) and not objects):
            remedy = "correct the row"
            if isinstance(value, list):  # ms-swift 2
                remedy = (
                    "write one object with the captions under ref and the boxes under bbox, in the"
                    " order of `<ref-object>` and `<bbox>` in the text, with a `<bbox>` for each"
                    " box; all boxes of a row are in pixels (real), or fractions of the image sides"
                    " (norm1), such as thousandths divided by 1000"
                )
            raise InvalidRowError(
                f"objects {str(value)[:80]}",
                "{ref: texts, bbox: boxes, bbox_type: real or norm1, image_id: indices}",
                remedy,
            )
        sort_keys(objects, _OBJECT_KEYS, "objects", context.other_keys)
        boxes, image_ids = as_list(objects.get("bbox")), as_list(objects.get("image_id"))
        image_ids += [0] * (len(boxes) - len(image_ids))
        valid_ids = [one for one in image_ids if isinstance(one, int) and one >= 0]
        if not len(valid_ids) == len(image_ids) == len(boxes):
            raise InvalidRowError(
                f"image_id {str(objects.get('image_id'))[:60]} for {len(boxes)} boxes",
                "a 0-based image index for each box",
            )
        located_boxes = zip(boxes, valid_ids, strict=True)
        return cls(iter(as_list(objects.get("ref"))), located_boxes, _OBJECT_FRAMES[bbox_type])

    def iter_parts(self, placeholder: re.Match[str], images: RowImages) -> Iterator[ContentPart]:
        """Yield the reference, or the boxes, that a placeholder stands for."""
        label = None
        if placeholder["ref"] or placeholder["boxes"] is None:
            ref = next(self.refs, None)
            if not isinstance(ref, str):
                raise InvalidRowError(
                    f"a `<ref-object>` for the reference {ref!r}",
                    "a text under objects.ref for each `<ref-object>`",
                )
            label = ref
        if placeholder["boxes"] is None:
            yield make_text_part(label or "")
            return
        for _ in range(placeholder["boxes"].count("<bbox>")):
            value, image_index = next(self.boxes, (None, 0))
            if value is None:
                raise InvalidRowError(
                    f"{placeholder[0]!r} without a box",
                    "a box under objects.bbox for each `<bbox>`",
                )
            yield images.create_box(value, label, self.frame, image_index)


def build_turns_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[Turn],
    parse_turn: Callable[[Role, Any], Iterable[ContentPart]],
    media: RowMedia | None,
    *handled_keys: str,
) -> ImportExample:
    """Build a training example from the turns of a row.

    Args:
        media: Listed images and videos of the row, all of which must be placed.
        *handled_keys: Further keys of the row that the format has parsed. `sort_keys` handles the
            others, unless they have turns.

    Raises:
        UnsupportedKeyError: Another key has content that an import must not drop.
    """
    check_limit(len(turns), MAX_MESSAGES, "messages")
    messages: list[Message] = []
    has_prompt = False
    for role, content, calls, loss, _ in turns:
        is_first = role == "user" and not has_prompt
        unmarked = media.place_unmarked() if media is not None and is_first else []
        parts = merge_text_parts([*unmarked, *parse_turn(role, content), *calls])
        if any(isinstance(part, BoxPart) and part.label is None for part in parts):
            parts = _label_boxes(parts)
        if is_first:
            parts, has_prompt = context.add_prompt(parts), True
        messages.append(Message(role=role, content=parts, loss=loss))
    if media is not None:
        handled_keys = (*handled_keys, *IMAGE_KEYS, *VIDEO_KEYS)
        media.require_all_placed()
    all_parts: list[ContentPart] = []
    for message in messages:
        all_parts += message.content
    check_clip_bounds(row.record, all_parts, ROWS)
    names = _list_media_names(all_parts)
    used = {"system", *find_turn_keys(row.record), *handled_keys, *_list_tool_keys(row.record)}
    used |= {key for key in TURN_KEYS if not has_value(row.record.get(key))}
    if row.has_own_id:
        used.add("id")
    if row.record.get("mask_history") == 1:
        used.add("mask_history")
    meta = sort_keys(row.record, used, ROWS, context.other_keys, names)
    return build_example(row.id, messages, meta, turns[0].tools if turns else ())


def find_turn_keys(record: Record) -> tuple[str, ...]:
    """Return the keys of a row with its turns: a list, or a question and its answer.

    Raises:
        InvalidRowError: The row has no turns, or several lists of turns.
    """
    lists = [keys for keys in _TURN_LISTS if has_value(record.get(keys[0]))]
    if len(lists) > 1:
        names = " and ".join(keys[0] for keys in lists)
        raise InvalidRowError(
            f"turns under {names}",
            "the turns of a row under one key",
            "remove the key that is not meant for training, from all rows",
        )
    pairs = [keys for keys in _TURN_PAIRS if record.keys() >= set(keys[:2])]
    empty = [keys for keys in _TURN_LISTS if keys[0] in record]
    for keys in (*lists, *pairs, *empty):
        return keys
    raise InvalidRowError(
        f"a row with the keys {', '.join(map(str, record))}",
        "messages, conversations, query and response, or prompt and completion",
        "correct the row, or choose another --format",
    )


def parse_turns(record: Record, context: ImportContext, *, with_parts: bool = False) -> list[Turn]:
    """Return the turns of a row, after its system prompt, with tool calls in their turn.

    Args:
        with_parts: The content may also be a list of parts.

    Raises:
        InvalidRowError: The row has no turns, or one of them has neither role nor content.
        UnsupportedKeyError: A turn has content other than text.
    """
    tools = tuple(tool for key in _list_tool_keys(record) for tool in parse_tools(record[key]))
    turns: list[Turn] = []
    for raw_turn in _sort_results(_iter_turns(record)):
        turn = _parse_turn(raw_turn, context, with_parts=with_parts)
        if turn.role == "system" and isinstance(turn.content, str):
            match = _TOOLS_IN_PROMPT.search(turn.content)
            if match is not None and not turns:
                lines = (match["json"] or match["xml"]).splitlines()
                tools = tools or tuple(itertools.chain.from_iterable(map(parse_tools, lines)))
                turn = turn._replace(content=turn.content.replace(match[0], "").strip())
                if not turn.content:
                    continue
        results = [turn]
        if isinstance(turn.content, str):
            texts = _RESULT_TEXT.findall(turn.content) if "</tool_response>" in turn.content else []
            if turn.role in ("user", "tool") and texts and not _RESULT_TEXT.sub("", turn.content):
                results = [Turn("tool", text) for text in texts]
            if tools and turn.role == "assistant" and TOOL_CALL_END in turn.content:
                # Models write tool calls in tags within the text.
                parsed = [read_tool_call(text, tools) for text in find_tool_calls(turn.content)]
                # Start tags after the last end tag would each be searched up to the end.
                end = turn.content.rfind(TOOL_CALL_END) + len(TOOL_CALL_END)
                content = TOOL_CALL_TEXT.sub("", turn.content[:end]) + turn.content[end:]
                turn = turn._replace(content=content, calls=(*turn.calls, *parsed))
                results = [turn]
        last = turns[-1] if turns else None
        if last and last.role == turn.role == "assistant" and not (last.content and turn.content):
            content, loss = last.content or turn.content, merge_loss((last, turn))
            turns[-1] = last._replace(content=content, calls=(*last.calls, *turn.calls), loss=loss)
        else:
            turns += results
    if record.get("mask_history") == 1:
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        for index in answers[:-1]:
            turns[index] = turns[index]._replace(loss=False)
    if turns:
        turns[0] = turns[0]._replace(tools=tools)
    return turns


def merge_loss(turns: Sequence[Turn]) -> bool:
    """Return the loss of turns that become one answer. Raises InvalidRowError if it differs."""
    if len({turn.loss for turn in turns}) > 1:
        raise InvalidRowError(
            f"{len(turns)} turns of the assistant in a row, only some of them without loss",
            "the same loss for the text and the tool calls of an answer",
        )
    return turns[0].loss


def _sort_results(turns: Iterable[Any]) -> Iterator[Any]:
    """Yield the turns, with consecutive tool results in the order of the calls of their IDs."""
    ids: list[str] = []
    pairs = ((isinstance(one, dict) and get_role(one) == "tool", one) for one in turns)
    for is_result, group in itertools.groupby(pairs, itemgetter(0)):
        members = [turn for _, turn in group]
        if is_result:
            stated = [str(turn.get("tool_call_id") or "") for turn in members]
            unknown = [one for one in stated if ids and one and one not in ids]
            if unknown:
                what = f"a tool result with the tool_call_id {unknown[0][:60]!r}"
                raise InvalidRowError(what, f"the ID of a call before it: {', '.join(ids)[:80]}")
            if all(one in ids for one in stated):
                members.sort(key=lambda turn: ids.index(str(turn["tool_call_id"])))
        calls = [turn.get("tool_calls") for turn in members if isinstance(turn, dict)]
        found = itertools.chain.from_iterable(map(as_list, calls))
        ids = [str(one["id"]) for one in found if isinstance(one, dict) and one.get("id")]
        yield from members


def _parse_turn(turn: Record, context: ImportContext, *, with_parts: bool) -> Turn:
    role = get_role(turn) if isinstance(turn, dict) else None
    if role is None:
        raise _build_turn_error(turn)
    text_key = "content" if turn.get("value") is None else "value"
    content = turn.get(text_key)
    calls: list[object] = []
    if role == "assistant":
        calls = [call for key in CALL_KEYS for call in as_list(decode_json(turn.get(key)))]
        if _CALL_ROLES.fullmatch(_get_speaker(turn)):
            reasoning_block = ""
            if isinstance(content, str) and (match := _REASONING.match(content)):
                reasoning_block = match[1]
                content = content[match.end() :]
            calls = as_list(decode_json(content))
            content = reasoning_block
        content = "" if content is None and calls else content
    others, loss = _split_loss(turn, role)
    reasoning = format_reasoning(sort_turn_keys(others, role, text_key, context), str(content))
    if isinstance(content, str):
        content = f"{reasoning}{content}"
    elif not with_parts:
        raise _build_turn_error(turn)
    elif reasoning:
        content = [{"type": "text", "text": reasoning}, *as_list(content)]
    return Turn(role, content, tuple(map(read_tool_call, calls)), loss)


def _list_tool_keys(record: Record) -> list[str]:
    """Return the keys of a row with definitions of tools; other texts are metadata."""
    return [
        key
        for key in _TOOL_KEYS
        if isinstance(value := record.get(key), list)
        or (isinstance(value, str) and value.lstrip().startswith("["))
    ]


def parse_tools(value: object) -> Iterator[Record]:
    """Yield the definitions of tools in a list, also as JSON text; a bare function is accepted."""
    for tool in as_list(decode_json(value)):
        is_bare = isinstance(tool, dict) and "function" not in tool
        try:
            yield check_tool({"type": "function", "function": tool} if is_bare else tool)
        except ValueError as error:
            raise InvalidRowError(f"the tool {str(tool)[:80]}", str(error)) from error


def decode_json(value: object) -> object:
    """Parse JSON text; remove keys without a value from objects, as Parquet adds them."""
    if not isinstance(value, str):
        return remove_nulls(value)
    try:
        return parse_unique_json(value)
    except ValueError:
        return value


def read_tool_call(value: object, tools: Sequence[Record] = ()) -> ToolCallPart:
    """Parse a tool call, and reject keys that it would lose, such as `parameters`."""
    data = decode_json(value) if isinstance(value, str) else value
    inner = data.get("function") if isinstance(data, dict) else None
    keys = {key for one in (data, inner) if isinstance(one, dict) for key in one}
    is_xml = isinstance(data, str) and data.lstrip().startswith("<")
    call = parse_tool_call(str(data), tools) if is_xml else ToolCallPart.from_json(data)
    num_lost = str(data).count("<parameter=") - len(call.arguments) if call and is_xml else 0
    if call is None or num_lost or not keys <= _CALL_PART_KEYS:
        expected = '{"name": text, "arguments": object}, optionally under `function`'
        raise InvalidRowError(f"the tool call {str(value)[:80]}", expected)
    return call


def _split_loss(turn: Record, role: Role) -> tuple[Record, bool]:
    """Return a turn without the keys that exclude it from training, and whether it is trained."""
    keys = [
        key
        for key, value in turn.items()
        if role == "assistant"
        and is_loss_key(str(key))
        and value in (0, 1)
        and not is_loss_default(key, value)
    ]
    return {key: value for key, value in turn.items() if key not in keys}, not keys


def _iter_turns(record: Record) -> Iterator[Any]:
    """Yield the turns of a row as objects with role and content, in any layout."""
    keys = find_turn_keys(record)
    if system := record.get("system"):
        yield {"role": "system", "content": system if isinstance(system, list) else str(system)}
    if keys in _TURN_LISTS:
        values = record[keys[0]]
        if not isinstance(values, list) or not values:
            raise InvalidRowError(f"{keys[0]} is {describe_value(values)}", "a list of turns")
        yield from itertools.chain.from_iterable(map(_split_pair, values))
        return
    for key in keys:
        if not isinstance(record.get(key), str | list | (None if key in keys[2:] else str)):
            raise InvalidRowError(f"{key} is {record[key]!r}", "text")
    for pair in as_list(record.get("history") if "history" in keys else None):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise InvalidRowError(
                f"history with {str(pair)[:60]!r}", "pairs of texts, [question, answer]"
            )
        yield from _split_pair({"human": pair[0], "assistant": pair[1]})
    question, answer = record[keys[0]], record[keys[1]]
    if "input" in keys and has_value(record.get("input")):
        question = f"{question}\n{record['input']}"
    for role, value in (("user", question), ("assistant", answer)):
        yield from value if isinstance(value, list) else [{"role": role, "content": value}]


def _split_pair(turn: Any) -> list[Any]:
    """Return question and answer of a turn with both and without a role, else the turn."""
    if not isinstance(turn, dict) or not {"human", "assistant"} <= turn.keys():
        return [turn]
    if any(has_value(turn.get(key)) for key in (*ROLE_KEYS, "content", "value")):
        return [turn]
    others = {key: value for key, value in turn.items() if key not in ("human", "assistant")}
    question = {"role": "user", "content": turn["human"]}
    system = [{"role": "system", "content": others.pop("system")}] if others.get("system") else []
    return [*system, question, {**others, "role": "assistant", "content": turn["assistant"]}]


def _build_turn_error(turn: object) -> InvalidRowError:
    keys = "{role: ..., content: text}"
    if isinstance(turn, dict) and ("from" in turn or "value" in turn):
        keys = "{from: ..., value: text}"
    return InvalidRowError(f"the turn {str(turn)[:80]}", f"{keys} from one of {', '.join(ROLES)}")


def sort_turn_keys(turn: Record, role: Role, text_key: str, context: ImportContext) -> str:
    """Handle the keys of a turn besides role and content; return the reasoning of an answer.

    Raises:
        UnsupportedKeyError: A key has content other than text, or a loss weight.
    """
    role_key = "role" if turn.get("from") is None else "from"
    used = (role_key, text_key, *_USED_KEYS.get(role, ()))
    others = {key: value for key, value in turn.items() if key not in used}
    reasoning = ""
    if role == "assistant":
        texts = {key: text for key in REASONING_KEYS if isinstance(text := others.get(key), str)}
        reasoning = next(filter(str.strip, texts.values()), "")
        others = {k: v for k, v in others.items() if k not in texts or v not in (reasoning, "")}
    else:  # only answers are trained on, so that a loss weight of 0 is the default
        others = {
            key: None if value == 0 or (value == 1 and is_loss_key(key)) else value
            for key, value in others.items()
        }
    sort_keys(others, (), TURNS, context.other_keys)
    return reasoning


def _list_media_names(parts: Iterable[ContentPart]) -> set[str]:
    """Return the file names of images, video frames and videos."""
    return {Path(path).name for part in parts for path in list_media_paths(part)}


def format_reasoning(reasoning: str, answer: str) -> str:
    """Format a reasoning as in chat templates of reasoning models; the answer follows it."""
    if "</think>" in reasoning or (reasoning and "</think>" in answer):
        raise InvalidRowError(
            f"the reasoning {reasoning[:40]!r} and the answer {answer[:40]!r} with </think>",
            "the reasoning in one place",
        )
    return f"<think>\n{reasoning.strip()}\n</think>\n\n" if reasoning else ""


def get_role(turn: Record) -> Role | None:
    """Return the role of a turn, or None if it is missing or unknown."""
    speaker = _get_speaker(turn)
    if _CALL_ROLES.fullmatch(speaker):
        return "assistant"
    return "tool" if _RESULT_ROLES.fullmatch(speaker) else ROLES.get(speaker)


def _get_speaker(turn: Record) -> str:
    speaker = turn.get("role") if turn.get("from") is None else turn["from"]
    return speaker if isinstance(speaker, str) else ""


def list_turn_texts(record: Record) -> list[tuple[Role | None, str]]:
    """Return role and text of each turn with text, for format detection."""
    turns = record.get("conversations")
    return [
        (get_role(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def list_images(record: Record, keys: Sequence[str] = IMAGE_KEYS) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order."""
    return [
        image
        for key in keys
        if key in record and has_value(record[key])
        for image in as_list(record[key])
    ]


def list_videos(record: Record) -> list[object]:
    """Return the videos under the keys `video` and `videos` of a record, in order.

    A video is a file, a folder of frames or a list of them; a plain list of images is one video.
    """
    videos: list[object] = []
    for values in (as_list(record[key]) for key in VIDEO_KEYS if has_value(record.get(key))):
        is_frame_list = all(is_image_value(v) and not isinstance(v, list) for v in values)
        videos += [values] if is_frame_list else values
    return videos


def write_rows(
    samples: Sequence[LocatedSample],
    context: ExportContext,
    make_fields: Callable[[LocatedSample, ExportContext], Record],
    keeps: Collection[str] = (),
    box_note: str | None = None,
) -> Files:
    """Yield one JSON line per sample for the file data.jsonl.

    A row has an ID, the content from `make_fields`, and metadata. References, metadata under
    reserved keys, and rejected answers whose rows differ in more than the turns are not written;
    they are counted as lost content.

    Args:
        keeps: Further content that the fields represent: "tools" with their calls and results,
            "loss" of single turns.
        box_note: End of a note for the user that boxes in answers are written as JSON text.
    """
    num_with_boxes = 0
    for located_sample in samples:
        row = _encode_row(located_sample, context, make_fields, keeps)
        yield JSONL_FILE, f"{row}\n".encode()
        parts = located_sample.sample.iter_parts()
        num_with_boxes += any(isinstance(part, BoxPart) for part in parts)
    if num_with_boxes and box_note is not None:
        context.notes.append(
            f"the boxes of {num_with_boxes} samples are JSON in the answers, in pixels of the"
            f" original images{box_note}"
        )


def _encode_row(
    located_sample: LocatedSample,
    context: ExportContext,
    make_fields: Callable[[LocatedSample, ExportContext], Record],
    keeps: Collection[str],
) -> str:
    sample = located_sample.sample
    try:
        if "tools" not in keeps:
            _check_no_tools(sample)
        fields = make_fields(located_sample, context)
        has_label = sample.label is not None and bool(fields.keys() & TURN_KEYS)
        fields |= {"label": sample.label} if has_label else {}
        if sample.rejected:
            other = sample.model_copy(update={"messages": sample.rejected_messages})
            others = make_fields(replace(located_sample, sample=other), context)
            fields |= _pair_turns(fields, others)
    except UserError as error:
        error.what = f"the sample {sample.id!r} cannot be written: {error.what}"
        raise
    names = _list_media_names(sample.iter_parts())
    reserved = {
        key
        for key, value in sample.meta.items()
        if key in RESERVED_KEYS or key in fields or find_meaning(key, value, ROWS, names)
    }
    num_masked = sum(not message.loss for message in sample.messages)
    context.lost_counts["loss of single turns"] += num_masked * ("loss" not in keeps)
    context.lost_counts["tools"] += bool(sample.tools) and "tools" not in fields
    context.lost_counts["references"] += len(sample.references)
    has_rejected = not fields.keys().isdisjoint(("rejected", "rejected_messages"))
    context.lost_counts["rejected answers"] += bool(sample.rejected) and not has_rejected
    context.lost_counts["labels of answers"] += sample.label is not None and not has_label
    context.lost_counts["metadata with a key that the format uses"] += len(reserved)
    meta = {key: value for key, value in sample.meta.items() if key not in reserved}
    return json.dumps({"id": sample.id, **fields, **meta}, ensure_ascii=False)


def _pair_turns(chosen: Record, rejected: Record) -> Record:
    """Return the fields that make the row of a chosen answer a preference pair, if possible."""
    differing = [key for key in chosen if chosen[key] != rejected.get(key)]
    if differing == ["messages"]:
        return {"rejected_messages": rejected["messages"]}
    if differing == ["conversations"]:
        *turns, answer = chosen["conversations"]
        worse = rejected["conversations"][-1]
        return {"conversations": turns, "chosen": answer, "rejected": worse}
    return {}


def render_turns(
    located_sample: LocatedSample,
    context: ExportContext,
    placeholder: str = "<image>",
) -> tuple[list[TextTurn], list[str]]:
    """Render the turns of a sample as texts without tool calls, with boxes in answers as JSON."""
    sample = located_sample.sample
    num_images = sum(isinstance(part, ImagePart) for part in sample.iter_parts())
    renderer = PartRenderer(located_sample, context, placeholder)
    turns: list[TextTurn] = [
        (
            message.role,
            format_answer(without_calls(message), num_images)
            if message.role == "assistant"
            else "".join(map(renderer.render, message.content)),
        )
        for message in sample.messages
    ]
    return turns, renderer.image_names


@dataclass(slots=True)
class PartRenderer:
    """Render text and image parts of a sample, and collect its image names in order."""

    located_sample: LocatedSample
    context: ExportContext
    placeholder: str = "<image>"
    image_names: list[str] = field(default_factory=list)

    def render(self, part: ContentPart) -> str:
        """Render a text or image part of a question as text."""
        if isinstance(part, TextPart):
            return make_text_part(part.text).text
        if isinstance(part, ImagePart):
            path = self.located_sample.resolve_path(part.image)
            self.image_names.append(self.context.image_names[path])
            return self.placeholder.replace("{}", self.image_names[-1])
        raise UserError(
            f"a {part.type} in a question",
            expected="text and images, the only content that the format supports",
            remedy="export to samples or, for boxes, to ms-swift; or remove the sample",
        )
