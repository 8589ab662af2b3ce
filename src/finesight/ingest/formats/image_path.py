"""Conversations whose first user message is only an image path; `--prompt` sets the question.

Later user messages are text unless they are image paths as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finesight.ingest.formats.conversation_placeholders import is_image_path
from finesight.ingest.formats.conversation_rows import (
    build_turns_example,
    list_turn_texts,
    parse_text,
    parse_turns,
)
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
    RowImages,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.sample import ContentPart, Role


def _detect_image_path(records: Sequence[Record]) -> str | None:
    for record in records:
        question = next((text for role, text in list_turn_texts(record) if role == "user"), "")
        if not is_image_path(question):
            return None
    return f"the user text is an image path in all of the first {len(records)}"


def _parse_image_path(row: SourceRow, context: ImportContext) -> ImportExample:
    row_images = RowImages(context)

    def parse_turn(role: Role, text: str) -> Iterable[ContentPart]:
        if role == "user" and (not row_images.paths or is_image_path(text)):
            return [row_images.add_image(text)]
        return parse_text(role, text, row_images)

    turns = parse_turns(row.record, context)
    return build_turns_example(row, context, turns, parse_turn, None)


COMPONENT = DatasetFormat(
    name="image-path",
    description='"conversations": [{"role": "user", "value": "path"}, ...], question by --prompt',
    detect=_detect_image_path,
    parse_row=_parse_image_path,
    position=160,
)
