"""Conversations with image paths between `<|vision_start|>` and `<|vision_end|>` in the text.

{"conversations": [{"from": "user", "value": "COCO Yes: <|vision_start|>a.jpg<|vision_end|>"},
                   {"from": "assistant", "value": "A dog on a lawn."}]}

A record may have any number of turns, with several images at any position in the text. If it lists
its images under `image` or `images`, each `<image>` in the text stands for the next of them. See
`conversation_rows` for boxes in answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from finesight.data.formats import conversation_rows
from finesight.data.formats.conversation_rows import (
    Turn,
    build_turns_example,
    list_checked_images,
    list_turn_texts,
    parse_answer,
    parse_turns,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    PlaceholderCountError,
    RowImages,
    split_at_pattern,
    strip_object_refs,
)
from finesight.data.formats.image_path import is_image_path
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import ContentPart, ImagePart, Role
from finesight.errors import UserError

IMAGE_PLACEHOLDER = re.compile(
    r"<\|vision_start\|>(?P<path>(?:(?!<\|vision_).)*)<\|vision_end\|>|<image>", re.DOTALL
)


KEYS = ("conversations", "system", *IMAGE_KEYS)
"""Keys of a record that become content; all other keys become metadata."""


def detect(records: Sequence[Record]) -> str | None:
    """Detect conversations of any kind, and return the reason for the match or None.

    Formats with their own placeholders are tested earlier.
    """
    turns_per_record = [list_turn_texts(record) for record in records]
    if not all(turns_per_record):
        return None
    num_placeholders = sum(
        len(IMAGE_PLACEHOLDER.findall(text)) for turns in turns_per_record for _, text in turns
    )
    return (
        f"turns with text under `value`, {num_placeholders} image placeholders in the first"
        f" {len(records)}"
    )


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a conversation row."""
    return read_conversation(row, context, parse_turns(row.record))


def read_conversation(
    row: SourceRow, reading: ImportContext, turns: Sequence[Turn]
) -> ImportExample:
    """Build a training example from the role and text of each turn of a row.

    Raises:
        UserError: A user turn contains only a path, or images and placeholders differ in number.
    """
    scene = RowImages(reading)
    named = list_checked_images(row.record)
    unplaced = iter(named)

    def parts_of(role: Role, text: str) -> Iterator[ContentPart]:
        if role == "user" and is_image_path(text):
            raise UserError(
                f"the user turn contains only a path, {text.strip()[:60]!r}",
                expected="a question, with the path in a placeholder if it is an image",
                remedy="choose --format image-path if this applies to all rows, or correct the row",
            )
        for piece in split_at_pattern(text, IMAGE_PLACEHOLDER):
            if not isinstance(piece, str):
                yield scene.add_image(piece["path"] or _next_image(unplaced, text))
            elif role == "assistant":
                yield from parse_answer(piece, scene)
            else:
                yield strip_object_refs(piece)

    case = build_turns_example(row, reading, turns, parts_of, *KEYS)
    left = len(list(unplaced))
    if left:
        raise PlaceholderCountError(
            f"{len(named)} images are listed, {left} of them have no `<image>` in the text",
            expected="one `<image>` per image",
            remedy="correct the row",
        )
    return case


def _next_image(remaining_images: Iterator[object], text: str) -> object:
    for value in remaining_images:
        return value
    raise PlaceholderCountError(
        f"a placeholder without an image in the text {text[:60]!r}",
        expected="a path inside the placeholder, or an image under `image` or `images`",
        remedy="add the image, or remove the placeholder from the text",
    )


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write conversations with image paths in placeholders, and boxes as JSON.

    Boxes are in pixels of the original image.
    """

    def make_record(located_sample: LocatedSample) -> Record:
        def make_placeholder(part: ImagePart) -> str:
            name = context.image_name(located_sample.resolve_path(part.image))
            return f"<|vision_start|>{name}<|vision_end|>"

        turns_text = render_turns(located_sample, make_placeholder)
        turns = [{"from": role, "value": text} for role, text in turns_text]
        return conversation_rows.build_record(located_sample, context, {"conversations": turns})

    yield from conversation_rows.write_rows(samples, make_record)
    conversation_rows.add_box_note(samples, context)


def render_turns(
    located_sample: LocatedSample, make_placeholder: Callable[[ImagePart], str]
) -> list[Turn]:
    """Render the turns of a sample as texts with image placeholders.

    Raises:
        UserError: A question consists of an image file name, which an import would read as an
            image.
    """
    turns = conversation_rows.render_turns(located_sample, make_placeholder)
    paths = [text for role, text in turns if role == "user" and is_image_path(text)]
    if paths:
        raise UserError(
            f"a question that is an image file name, {paths[0]!r}",
            expected="text that is not an image file name",
            remedy="export to ms-swift or samples, or remove the sample",
        )
    return turns


FORMAT = DatasetFormat(
    name="conversations",
    description=(
        '"conversations": [{"from": "user", "value": "...<|vision_start|>path<|vision_end|>"}]'
    ),
    typical_keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
