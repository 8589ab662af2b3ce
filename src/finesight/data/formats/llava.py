r"""The format of LLaVA: ShareGPT conversations with an image.

[{"id": "1", "image": "a.jpg",
  "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "A dog on a lawn."}]}]

The LLaVA guide "Finetune LLaVA on Custom Datasets" documents it. The line break after `<image>` is
removed, because each model family adds its own. If `image` is a list, each `<image>` stands for the
next image. See `conversation_rows` for boxes in answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finesight.data.formats import conversation_rows, conversations
from finesight.data.formats.conversation_rows import list_turn_texts, parse_turns
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
)
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.errors import UserError

LLAVA_FILE = "data.json"


def detect(records: Sequence[Record]) -> str | None:
    """Detect LLaVA conversations, and return the reason for the match or None.

    At least one record has an `image` and an `<image>` placeholder; others may be text only.
    """
    num_with_images = 0
    for record in records:
        turns, image = list_turn_texts(record), record.get("image")
        if not turns or not isinstance(image, str | list | None):
            return None
        num_with_images += image is not None and any("<image>" in text for _, text in turns)
    return (
        f"turns with `<image>`, and image in {num_with_images} of the first {len(records)}"
        if num_with_images
        else None
    )


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a LLaVA conversation."""
    turns = [(role, text.replace("<image>\n", "<image>")) for role, text in parse_turns(row.record)]
    return conversations.read_conversation(row, context, turns)


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write a JSON array of LLaVA conversations.

    Raises:
        UserError: A sample has more than one image, or a system prompt.
    """

    def make_record(located_sample: LocatedSample) -> Record:
        placeholder = conversation_rows.ImagePlaceholder(located_sample, context, "<image>\n")
        text_turns = conversations.render_turns(located_sample, placeholder)
        if len(placeholder.image_names) > 1 or text_turns[0][0] == "system":
            raise UserError(
                f"{len(placeholder.image_names)} images, and turns of"
                f" {', '.join(role for role, _ in text_turns)}",
                expected="at most one image, and only user and assistant turns",
                remedy="export to llama-factory or ms-swift, or remove the sample",
            )
        speakers = {"user": "human", "assistant": "gpt"}
        turns = [{"from": speakers[role], "value": text} for role, text in text_turns]
        image = {"image": placeholder.image_names[0]} if placeholder.image_names else {}
        return conversation_rows.build_record(
            located_sample, context, {**image, "conversations": turns}
        )

    for sample_index, located_sample in enumerate(samples):
        line = (
            ("," if sample_index else "[")
            + "\n"
            + conversation_rows.format_record(make_record, located_sample)
        )
        yield LLAVA_FILE, line.encode()
    yield LLAVA_FILE, b"\n]\n"
    conversation_rows.add_box_note(samples, context)


FORMAT = DatasetFormat(
    name="llava",
    description='"image": "path", "conversations": [{"from": "human", "value": "<image>\\n..."}]',
    typical_keys=frozenset({"image", "conversations", "from", "value"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
