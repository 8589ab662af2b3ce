"""The two formats of LLaMA-Factory: sharegpt (turns with a list of images) and alpaca.

{"conversations": [{"from": "human", "value": "<image>What is this?"},
                   {"from": "gpt", "value": "A dog."}], "images": ["a.jpg"]}
{"instruction": "<image>What is this?", "input": "", "output": "A dog.", "images": ["a.jpg"]}

The README of its `data` folder documents them; the default names of columns and roles are
supported. Each `<image>` in the text stands for the next image. In alpaca, the question is the
instruction followed by the input on a new line; `system` and `history` are the system prompt and
earlier turns.

LLaMA-Factory messages with `role` and `content` are read as `ms-swift`. The format has no boxes of
its own: see `conversation_rows` for boxes in answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from finesight.data.formats import conversation_rows, conversations
from finesight.data.formats.conversation_rows import Turn, list_turn_texts, parse_history
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    has_value,
)
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.errors import UserError

SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
DATASET_INFO = {
    "finesight": {
        "file_name": conversation_rows.JSONL_FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
}
BOX_NOTE = (
    ". LLaMA-Factory trains on these coordinates unchanged, even if it resizes images to"
    " image_max_pixels (768 x 768 unless set): set that above your largest image"
)
ALPACA_KEYS = ("instruction", "input", "output", "history")


def detect(records: Sequence[Record]) -> str | None:
    """Detect the alpaca or sharegpt format, and return the reason for the match or None.

    All alpaca records have an instruction and an output. In sharegpt, at least one record lists
    images.
    """
    if all({"instruction", "output"} <= record.keys() for record in records):
        return f"keys instruction and output in all of the first {len(records)} (alpaca)"
    if not all(list_turn_texts(record) for record in records):
        return None
    num_with_images = sum(isinstance(record.get("images"), list) for record in records)
    if not num_with_images:
        return None
    return (
        f"turns, and a list of images in {num_with_images} of the first {len(records)} (sharegpt)"
    )


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row in the alpaca or sharegpt format."""
    if "conversations" in row.record:
        return conversations.parse_row(row, context)
    other_values = {key: value for key, value in row.record.items() if key not in ALPACA_KEYS}
    turns = [{"from": role, "value": text} for role, text in _parse_alpaca(row.record)]
    return conversations.parse_row(
        replace(row, record={**other_values, "conversations": turns}), context
    )


def _parse_alpaca(record: Record) -> list[Turn]:
    instruction, input_text, output = (record.get(key) for key in ALPACA_KEYS[:3])
    if (
        not isinstance(instruction, str)
        or not isinstance(output, str)
        or not isinstance(input_text, str | None)
    ):
        raise UserError(
            ", ".join(f"{key} {str(record.get(key))[:30]!r}" for key in ALPACA_KEYS[:3]),
            expected="three texts, input being optional",
            remedy="correct the row",
        )
    question = f"{instruction}\n{input_text}" if has_value(input_text) else instruction
    return [*parse_history(record), ("user", question), ("assistant", output)]


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write sharegpt rows, and a dataset_info.json that registers them as `finesight`."""

    def make_record(located_sample: LocatedSample) -> Record:
        placeholder = conversation_rows.ImagePlaceholder(located_sample, context)
        text_turns = conversations.render_turns(located_sample, placeholder)
        turns = [{"from": SHAREGPT_ROLES[role], "value": text} for role, text in text_turns]
        return conversation_rows.build_record(
            located_sample, context, {"conversations": turns, "images": placeholder.image_names}
        )

    yield from conversation_rows.write_rows(samples, make_record)
    yield "dataset_info.json", f"{json.dumps(DATASET_INFO, indent=2)}\n".encode()
    conversation_rows.add_box_note(samples, context, BOX_NOTE)


FORMAT = DatasetFormat(
    name="llama-factory",
    description='"conversations": [{"from": "human", "value": "<image>..."}], "images": ["path"]',
    typical_keys=frozenset({"conversations", "from", "value", "images", "instruction", "output"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
