"""LLaVA: the guide "Finetune LLaVA on Custom Datasets" documents the format.

The line break after `<image>` at the start is removed, because each model family adds its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from finesight.errors import UserError
from finesight.ingest.formats.conversation_placeholders import (
    SPEAKERS,
    build_placeholder_example,
    render_checked,
)
from finesight.ingest.formats.conversation_rows import (
    list_turn_texts,
    parse_turns,
    write_rows,
)
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    join_leading_media,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.sample import LocatedSample

LLAVA_FILE = "data.json"


def _detect_llava(records: Sequence[Record]) -> str | None:
    """Detect LLaVA: at least one record has an `image` and `<image>`, others may be text only.

    A `video` with `<video>` or `<image>` counts as well.
    """
    num_with_images = 0
    for record in records:
        turns, image = list_turn_texts(record), record.get("image", record.get("video"))
        if not turns or not isinstance(image, str | list | None):
            return None
        tags = ("<image>",) if "image" in record else ("<image>", "<video>")
        num_with_images += image is not None and any(t in text for _, text in turns for t in tags)
    reason = f"turns with `<image>`, and image in {num_with_images} of the first {len(records)}"
    return reason if num_with_images else None


def _parse_llava(row: SourceRow, context: ImportContext) -> ImportExample:
    turns = [
        turn._replace(content=join_leading_media(turn.content))
        for turn in parse_turns(row.record, context)
    ]
    return build_placeholder_example(row, context, turns)


def _write_llava(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write a JSON array of conversations about at most one image, without system prompt."""

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        turns, image_names = render_checked(located_sample, context, "<image>")
        if len(image_names) > 1 or turns[0][0] == "system":
            raise UserError(
                f"{len(image_names)} images, and turns of {', '.join(role for role, _ in turns)}",
                expected="at most one image, and only user and assistant turns",
                remedy="export to llama-factory or ms-swift, or remove the sample",
            )
        image = {"image": image_names[0]} if image_names else {}
        rows: list[Record] = []
        for role, text in turns:
            if text.startswith("<image>"):
                text = f"<image>\n{text.removeprefix('<image>')}"
            rows.append({"from": SPEAKERS[role], "value": text})
        return {**image, "conversations": rows}

    for index, (_, row) in enumerate(write_rows(samples, context, make_fields, box_note="")):
        yield LLAVA_FILE, (b",\n" if index else b"[\n") + row.removesuffix(b"\n")
    yield LLAVA_FILE, b"\n]\n"


COMPONENT = DatasetFormat(
    name="llava",
    description='"image": "path", "conversations": [{"from": "human", "value": "<image>\\n..."}]',
    detect=_detect_llava,
    parse_row=_parse_llava,
    write_files=_write_llava,
    # Before `conversations`: it has an `image`, and its own tag.
    position=180,
)
