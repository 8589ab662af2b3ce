"""Conversations with image paths between `<|vision_start|>` and `<|vision_end|>`.

They may be at any position. A conversation may have any number of turns and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from finesight.ingest.formats.conversation_placeholders import (
    IMAGE_PLACEHOLDER,
    parse_conversation,
    render_checked,
)
from finesight.ingest.formats.conversation_rows import list_turn_texts, write_rows
from finesight.ingest.formats.dataset_format import DatasetFormat, ExportContext
from finesight.ingest.row_reader import Record
from finesight.samples.sample import LocatedSample


def _detect_conversations(records: Sequence[Record]) -> str | None:
    """Detect conversations of any kind; formats with their own placeholders are tested earlier."""
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


def _make_conversation(located_sample: LocatedSample, context: ExportContext) -> Record:
    turns, _ = render_checked(located_sample, context, "<|vision_start|>{}<|vision_end|>")
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


COMPONENT = DatasetFormat(
    name="conversations",
    description=(
        '"conversations": [{"from": "user", "value": "...<|vision_start|>path<|vision_end|>"}]'
    ),
    detect=_detect_conversations,
    parse_row=parse_conversation,
    write_files=partial(write_rows, make_fields=_make_conversation, box_note=""),
    # After the other turns: any match.
    position=200,
)
