"""The format of LLaVA, which ShareGPT's turns with a picture have become.

[{"id": "1", "image": "a.jpg",
  "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                    {"from": "gpt", "value": "A dog on a lawn."}]}]

As "Finetune LLaVA on Custom Datasets" in its documentation has it. The line break after `<image>`
is dropped, as each family writes its own. Of a list of pictures each has its `<image>`. See
`boxed_text` for what is read of boxes in answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finesight.data.case import Case
from finesight.data.formats import conversations, texts
from finesight.data.formats.format import Format, Reading, Writing
from finesight.data.formats.turns import said_in, turns_of
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.errors import UserError

FILE = "data.json"


def detect(records: Sequence[Record]) -> str | None:
    """Turns with `<image>` and a picture under `image`; records without one have turns alone."""
    shown = 0
    for record in records:
        said, image = said_in(record), record.get("image")
        if not said or not isinstance(image, str | list | None):
            return None
        shown += image is not None and any("<image>" in text for _, text in said)
    return (
        f"turns with `<image>`, and image in {shown} of the first {len(records)}" if shown else None
    )


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    turns = [(role, text.replace("<image>\n", "<image>")) for role, text in turns_of(row.record)]
    return conversations.read_conversation(row, reading, turns)


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """One JSON list, as LLaVA reads it. Raises UserError for two pictures or a system prompt."""

    def record_of(located: Located) -> Record:
        shown = texts.Shown(located, writing, "<image>\n")
        said = conversations.spoken(located, shown)
        if len(shown.names) > 1 or said[0][0] == "system":
            raise UserError(
                f"{len(shown.names)} pictures, and turns of {', '.join(role for role, _ in said)}",
                expected="at most one picture, and turns of user and assistant alone",
                remedy="export to llama-factory or ms-swift, or leave the sample out",
            )
        speakers = {"user": "human", "assistant": "gpt"}
        turns = [{"from": speakers[role], "value": text} for role, text in said]
        image = {"image": shown.names[0]} if shown.names else {}
        return texts.record(located, writing, {**image, "conversations": turns})

    for place, located in enumerate(samples):
        line = ("," if place else "[") + "\n" + texts.as_json(record_of, located)
        yield FILE, line.encode()
    yield FILE, b"\n]\n"
    texts.note_boxes(samples, writing)


FORMAT = Format(
    name="llava",
    looks='"image": "path", "conversations": [{"from": "human", "value": "<image>\\n..."}]',
    keys=frozenset({"image", "conversations", "from", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
