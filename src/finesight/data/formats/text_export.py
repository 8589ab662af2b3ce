"""Export samples as JSON Lines rows of conversation formats, with images as placeholders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from finesight.data.formats.answer_boxes import format_answer
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    UNSUPPORTED_KEYS,
    ExportContext,
    make_text_part,
)
from finesight.data.formats.turns import Turn
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record
from finesight.data.sample import BoxPart, ContentPart, ImagePart, TextPart
from finesight.errors import UserError

JSONL_FILE = "data.jsonl"

RESERVED_KEYS = frozenset(
    {
        *("messages", "conversations", "conversation", "query", "response", "system"),
        *("instruction", "input", "output", "label"),
    }
)
"""Metadata keys that are not exported, because a dataset format would read them as content."""

Files = Iterator[tuple[str, bytes]]
"""Relative file names with content. A repeated name appends to the file."""


def write_rows(
    samples: Sequence[LocatedSample], make_record: Callable[[LocatedSample], Record]
) -> Files:
    """Yield one JSON line per sample for the file data.jsonl.

    Raises:
        UserError: The format cannot represent a sample.
    """
    for located_sample in samples:
        yield JSONL_FILE, f"{format_record(make_record, located_sample)}\n".encode()


def add_box_note(
    samples: Sequence[LocatedSample], context: ExportContext, suffix: str = ""
) -> None:
    """Add a note for the user that boxes in answers are written as JSON text."""
    num_with_boxes = sum(
        any(isinstance(part, BoxPart) for part in located_sample.sample.iter_parts())
        for located_sample in samples
    )
    if num_with_boxes:
        context.notes.append(
            f"the boxes of {num_with_boxes} samples are JSON in the answers, in pixels of the"
            " original"
            f" images{suffix}"
        )


def format_record(
    make_record: Callable[[LocatedSample], Record], located_sample: LocatedSample
) -> str:
    """Build the record of a sample and encode it as JSON.

    Raises:
        UserError: The format cannot represent the sample. The error names the sample ID.
    """
    try:
        return json.dumps(make_record(located_sample), ensure_ascii=False)
    except UserError as error:
        raise UserError(
            f"the sample {located_sample.sample.id!r} cannot be written: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def build_record(
    located_sample: LocatedSample, context: ExportContext, fields: Mapping[str, object]
) -> Record:
    """Build the exported row of a sample from its content, ID and metadata.

    References and metadata under reserved keys are not written; they are counted as lost content.
    """
    sample = located_sample.sample
    reserved = {"id", *fields, *RESERVED_KEYS, *IMAGE_KEYS, *UNSUPPORTED_KEYS}
    context.lost_counts["references"] += len(sample.references)
    context.lost_counts["metadata with a key that the format uses"] += len(
        reserved & sample.meta.keys()
    )
    notes = {key: value for key, value in sample.meta.items() if key not in reserved}
    return {"id": sample.id, **fields, **notes}


def render_turns(
    located_sample: LocatedSample, make_placeholder: Callable[[ImagePart], str]
) -> list[Turn]:
    """Render the turns of a sample as texts, with image placeholders and boxes as JSON.

    See `answer_boxes` for the JSON of boxes.

    Raises:
        UserError: The sample contains videos, boxes in questions, or texts that an import would
            parse differently.
    """
    sample = located_sample.sample
    num_images = sum(isinstance(part, ImagePart) for part in sample.iter_parts())
    return [
        (
            message.role,
            format_answer(message.content, num_images)
            if message.role == "assistant"
            else "".join(render_part(part, make_placeholder) for part in message.content),
        )
        for message in sample.messages
    ]


def render_part(part: ContentPart, make_placeholder: Callable[[ImagePart], str]) -> str:
    """Render a text or image part of a question as text.

    Raises:
        UserError: The part is a video or a box.
    """
    if isinstance(part, TextPart):
        return make_text_part(part.text).text
    if isinstance(part, ImagePart):
        return make_placeholder(part)
    raise UserError(
        f"a {part.type} in a question",
        expected="text and images, the only content that the format supports",
        remedy="export to samples or, for boxes, to ms-swift; or remove the sample",
    )


class ImagePlaceholder:
    """Renderer of image parts as placeholders, which collects the image names in order."""

    def __init__(
        self, located_sample: LocatedSample, context: ExportContext, placeholder: str = "<image>"
    ) -> None:
        self._located, self._context, self._placeholder = located_sample, context, placeholder
        self.image_names: list[str] = []

    def __call__(self, part: ImagePart) -> str:
        self.image_names.append(self._context.image_name(self._located.resolve_path(part.image)))
        return self._placeholder
