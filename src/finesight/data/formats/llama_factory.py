"""The two formats of LLaMA-Factory: sharegpt, turns with pictures beside them, and alpaca.

{"conversations": [{"from": "human", "value": "<image>What is this?"},
                   {"from": "gpt", "value": "A dog."}], "images": ["a.jpg"]}
{"instruction": "<image>What is this?", "input": "", "output": "A dog.", "images": ["a.jpg"]}

As the README of its folder `data` has them, with the usual names of columns and speakers; its
messages of role and content are read as `ms-swift`. A picture stands where its `<image>` does. In
alpaca the question is the instruction and, on a line of its own, the input; `system` and `history`
are the system prompt and earlier rounds. It has no boxes of its own: see `boxed_text` for those in
the text of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from finesight.data.case import Case
from finesight.data.formats import conversations, texts
from finesight.data.formats.format import Format, Reading, Writing, holds
from finesight.data.formats.turns import Turn, history_of, said_in
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.errors import UserError

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
DESCRIPTION = {
    "finesight": {
        "file_name": texts.FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
}
BOX_NOTE = (
    ". LLaMA-Factory trains on these numbers as they are, also where it scales pictures down to"
    " image_max_pixels (768 x 768 unless set): set that above your largest picture"
)
ALPACA = ("instruction", "input", "output", "history")


def detect(records: Sequence[Record]) -> str | None:
    """An instruction with an output in all records, or turns with a list of images in some."""
    if all({"instruction", "output"} <= record.keys() for record in records):
        return f"keys instruction and output in all of the first {len(records)} (alpaca)"
    if not all(said_in(record) for record in records):
        return None
    shown = sum(isinstance(record.get("images"), list) for record in records)
    if not shown:
        return None
    return f"turns, and a list of images in {shown} of the first {len(records)} (sharegpt)"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    if "conversations" in row.record:
        return conversations.read(row, reading)
    rest = {key: value for key, value in row.record.items() if key not in ALPACA}
    turns = [{"from": role, "value": text} for role, text in _alpaca(row.record)]
    return conversations.read(replace(row, record={**rest, "conversations": turns}), reading)


def _alpaca(record: Record) -> list[Turn]:
    asked, more, said = (record.get(key) for key in ALPACA[:3])
    if not isinstance(asked, str) or not isinstance(said, str) or not isinstance(more, str | None):
        raise UserError(
            ", ".join(f"{key} {str(record.get(key))[:30]!r}" for key in ALPACA[:3]),
            expected="three texts, input being optional",
            remedy="correct the row",
        )
    question = f"{asked}\n{more}" if holds(more) else asked
    return [*history_of(record), ("user", question), ("assistant", said)]


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Turns in the sharegpt format, and a dataset_info.json that describes them as `finesight`."""

    def record_of(located: Located) -> Record:
        shown = texts.Shown(located, writing)
        said = conversations.spoken(located, shown)
        turns = [{"from": SPEAKERS[role], "value": text} for role, text in said]
        return texts.record(located, writing, {"conversations": turns, "images": shown.names})

    yield from texts.rows(samples, record_of)
    yield "dataset_info.json", f"{json.dumps(DESCRIPTION, indent=2)}\n".encode()
    texts.note_boxes(samples, writing, BOX_NOTE)


FORMAT = Format(
    name="llama-factory",
    looks='"conversations": [{"from": "human", "value": "<image>..."}], "images": ["path"]',
    keys=frozenset({"conversations", "from", "value", "images", "instruction", "output"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
