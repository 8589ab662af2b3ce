r"""Rows of `query`, `response` and `image`, with boxes as JSON under `bbox_2d` in the response.

{"image": ["a.jpg"], "query": "what is written on the ghost?",
 "response": "{\"bbox_2d\": [467, 628, 521, 661]}"}

This is the query-response format of ms-swift ("Custom Dataset" in its documentation). `history`
contains earlier turns as pairs of texts, and `system` the system prompt. Images precede the first
question unless `<image>` placeholders set their positions. See `conversation_rows` for boxes in
responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BOX_KEY
from finesight.data.formats import conversation_rows
from finesight.data.formats.conversation_rows import (
    Turn,
    build_turns_example,
    list_checked_images,
    parse_answer,
    parse_history,
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
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import ContentPart, Role
from finesight.errors import UserError

IMAGE_PLACEHOLDER = re.compile("<image>")
QUERY_KEYS = ("query", "response", "history", "system", *IMAGE_KEYS)


def detect(records: Sequence[Record]) -> str | None:
    """Detect query-response rows, and return the reason for the match or None."""
    if not all({"query", "response"} <= record.keys() for record in records):
        return None
    boxes = sum(BOX_KEY in str(record["response"]) for record in records)
    return f"keys query and response, {BOX_KEY} in {boxes} of the first {len(records)}"


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a query-response row."""
    images = RowImages(context)
    record = row.record
    system = record.get("system")
    turns: list[Turn] = [("system", str(system))] if system else []
    turns += parse_history(record)
    turns += [("user", _get_text(record, "query")), ("assistant", _get_text(record, "response"))]
    listed_images = list_checked_images(record)
    remaining_images = iter(listed_images)

    def parse_text(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, IMAGE_PLACEHOLDER):
            if not isinstance(piece, str):
                yield images.add_image(next(remaining_images))
            elif role == "assistant":
                yield from parse_answer(piece, images)
            else:
                yield strip_object_refs(piece)

    return build_turns_example(
        row, context, add_image_placeholders(turns, len(listed_images)), parse_text, *QUERY_KEYS
    )


def add_image_placeholders(turns: list[Turn], num_images: int) -> list[Turn]:
    """Add one `<image>` per image to the first question, unless the turns have placeholders.

    Raises:
        UserError: The number of existing placeholders differs from the number of images, or there
            is no user turn.
    """
    num_placeholders = sum(len(IMAGE_PLACEHOLDER.findall(text)) for _, text in turns)
    if num_placeholders == num_images:
        return turns
    if num_placeholders:
        raise PlaceholderCountError(
            f"{num_placeholders} `<image>` in the texts for {num_images} images",
            expected="one per image, or none",
            remedy="correct the row",
        )
    first_user = next(
        (turn_index for turn_index, (role, _) in enumerate(turns) if role == "user"), None
    )
    if first_user is None:
        raise UserError(
            f"{num_images} images but no user message",
            expected="a user message that the images belong to",
            remedy="correct the row",
        )
    role, text = turns[first_user]
    return [*turns[:first_user], (role, "<image>" * num_images + text), *turns[first_user + 1 :]]


def _get_text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} is {value!r}", expected="text", remedy="correct the row")
    return value


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write query-response rows, with earlier turns under `history` and boxes as JSON."""

    def make_record(located_sample: LocatedSample) -> Record:
        placeholder = conversation_rows.ImagePlaceholder(located_sample, context)
        text_turns = conversation_rows.render_turns(located_sample, placeholder)
        system, text_turns = (
            (text_turns[0][1], text_turns[1:]) if text_turns[0][0] == "system" else ("", text_turns)
        )
        texts = [text for _, text in text_turns]
        rounds = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        row: Record = {"query": rounds[-1][0], "response": rounds[-1][1]}
        if len(rounds) > 1:
            row["history"] = rounds[:-1]
        if system:
            row["system"] = system
        if placeholder.image_names:
            row["images"] = placeholder.image_names
        return conversation_rows.build_record(located_sample, context, row)

    yield from conversation_rows.write_rows(samples, make_record)
    conversation_rows.add_box_note(samples, context)


FORMAT = DatasetFormat(
    name="query-response",
    description='"image": ["path"], "query": "...", "response": "..."',
    typical_keys=frozenset({"query", "response"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
