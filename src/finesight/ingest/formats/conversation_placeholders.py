"""Conversations whose texts have placeholders of images, videos and objects.

If a record lists its images under `image` or `images`, each `<image>` in the text stands for the
next of them, and each `<video>` for the next of `video` or `videos`, which are video files. Listed
files precede the first question if the row has no placeholder at all; in ms-swift and
query-response, if it has none of their kind.

See `conversation_rows` for the keys of the turns and the boxes in answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.errors import UserError
from finesight.ingest.formats.conversation_rows import (
    ObjectQueue,
    RowMedia,
    TextTurn,
    Turn,
    build_turns_example,
    list_images,
    parse_text,
    parse_turns,
    render_turns,
)
from finesight.ingest.formats.dataset_format import (
    VIDEO_KEYS,
    ExportContext,
    ImportContext,
    ImportExample,
    PlaceholderCountError,
    split_at_pattern,
)
from finesight.ingest.row_reader import SourceRow
from finesight.samples.sample import (
    ContentPart,
    InvalidRowError,
    LocatedSample,
    Role,
    is_video_path,
)

_VIDEO_FIRST = re.compile(r"(?:<image>\s*)*<video>")
IMAGE_PLACEHOLDER = re.compile(
    r"<\|vision_start\|>(?P<path>(?:(?!<\|vision_).)*)<\|vision_end\|>|<image>", re.DOTALL
)
_IMAGE_PATH = re.compile(
    r"[^\n<>|]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|jp2|avif|pdf)(?:#page=[0-9]+)?", re.IGNORECASE
)
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
"""Names of the roles in LLaVA and sharegpt."""

_OBJECT_PLACEHOLDER = re.compile(
    r"<image>|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>"
)


NOTE_UNMARKED = "rows without a placeholder: their images or videos precede the first question"


def is_image_path(text: str) -> bool:
    """Return whether a text consists of a single image path."""
    return _IMAGE_PATH.fullmatch(text.strip()) is not None


def parse_conversation(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row of turns with placeholders of images."""
    return build_placeholder_example(row, context, parse_turns(row.record, context))


def build_placeholder_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[Turn],
    placeholder: re.Pattern[str] = IMAGE_PLACEHOLDER,
    objects: ObjectQueue | None = None,
) -> ImportExample:
    """Build a training example from turns whose placeholders stand for images and objects.

    Args:
        objects: References and boxes. With them, images and videos need placeholders separately,
            and a question may be an image path.
    """
    videos = list_images(row.record, VIDEO_KEYS)
    is_marked = any(_VIDEO_FIRST.match(turn.content) for turn in turns if turn.role == "user")
    if videos or is_marked:
        placeholder = re.compile(f"{placeholder.pattern}|<video>", re.DOTALL)
    tags = ("image", "video") if videos else ("image",)
    if objects is None:
        num_marked = _count_all_marked(turns, placeholder)
    else:
        num_marked = {tag: sum(turn.content.count(f"<{tag}>") for turn in turns) for tag in tags}
    media = RowMedia(row.record, context, num_marked)
    # Rows of LLaVA-Video mark their video by `<image>`.
    is_llava_video = objects is None and bool(videos) and not media.listed["image"]
    if objects is None and any(media.listed.values()) and not any(num_marked.values()):
        context.row_notes[NOTE_UNMARKED] = 1  # also for a pair, which is parsed twice
        _require_one_place(turns, media)

    def parse_turn(role: Role, text: str) -> Iterator[ContentPart]:
        if objects is None and role == "user" and is_image_path(text):
            raise UserError(
                f"the user turn contains only a path, {text.strip()[:60]!r}",
                expected="a question, with the path in a placeholder if it is an image",
                remedy="choose --format image-path if this applies to all rows, or correct the row",
            )
        for piece in split_at_pattern(text, placeholder):
            if isinstance(piece, str):
                yield from parse_text(role, piece, media)
            elif path := piece.groupdict().get("path"):
                yield media.add("video" if is_video_path(path) else "image", path)
            elif objects is not None and piece[0] not in ("<image>", "<video>"):
                yield from objects.iter_parts(piece, media)
            else:
                yield media.add("video" if is_llava_video or piece[0] == "<video>" else "image")

    handled_keys = () if objects is None else ("objects",)
    return build_turns_example(row, context, turns, parse_turn, media, *handled_keys)


def _count_all_marked(turns: Sequence[Turn], placeholder: re.Pattern[str]) -> dict[str, int]:
    """Return the number of placeholders of both kinds: with any, all listed files need one."""
    count = sum(len(placeholder.findall(turn.content)) for turn in turns)
    return {"image": count, "video": count}


def _require_one_place(turns: Sequence[Turn], media: RowMedia) -> None:
    """Raise PlaceholderCountError if several files may belong to several questions."""
    num_questions = 0
    for turn in turns:
        if turn.role == "user":
            num_questions += 1
    num_files = sum(map(len, media.listed.values()))
    if num_questions > 1 and num_files > 1:
        raise PlaceholderCountError(
            f"{num_files} images or videos without placeholders in {num_questions} questions",
            expected="`<image>` or `<video>` in the question about each file",
            remedy="write the placeholders into the questions",
        )


def render_checked(
    located_sample: LocatedSample, context: ExportContext, placeholder: str
) -> tuple[list[TextTurn], list[str]]:
    """Render turns, and reject a question that an import would read as an image path."""
    turns, image_names = render_turns(located_sample, context, placeholder)
    paths = [text for role, text in turns if role == "user" and is_image_path(text)]
    if paths:
        raise UserError(
            f"a question that is an image file name, {paths[0]!r}",
            expected="text that is not an image file name",
            remedy="export to ms-swift or samples, or remove the sample",
        )
    return turns, image_names


def parse_with_objects(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row whose objects are listed, as in ms-swift."""
    objects = ObjectQueue.from_value(row.record.get("objects"), context)
    turns = parse_turns(row.record, context)
    example = build_placeholder_example(row, context, turns, _OBJECT_PLACEHOLDER, objects)
    if num_refs_left := len(list(objects.refs)):  # ms-swift ignores them as well
        context.other_keys["references without `<ref-object>`, not imported"] += num_refs_left
    if num_boxes_left := len(list(objects.boxes)):
        raise InvalidRowError(
            f"{num_boxes_left} boxes under objects.bbox have no `<bbox>` in the text",
            "a `<bbox>` for each box",
        )
    return example
