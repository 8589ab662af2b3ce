"""Turns in which the user's text is a picture's path and nothing else.

{"conversations": [{"role": "user", "value": "LaTeX_OCR/0.jpg"},
                   {"role": "assistant", "value": "x ^ { 2 }"}]}

What the model is asked stands nowhere in such a file: `--prompt` says it. Later user turns are
text unless they, too, are a path. See `boxed_text` for what is read of boxes in the answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.data.case import Case
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import Format, Reading, Scene, plain
from finesight.data.formats.turns import Role, read_turns, said_in
from finesight.data.rows import Record, Row
from finesight.data.sample import Part

_PATH = re.compile(r"[^\n<>|]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|jp2|avif)", re.IGNORECASE)


def detect(records: Sequence[Record]) -> str | None:
    """The first user turn of every record is a path."""
    for record in records:
        asked = next((text for role, text in said_in(record) if role == "user"), "")
        if not is_path(asked):
            return None
    return f"the user's text is a picture's path in all of the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)

    def parts_of(role: Role, text: str) -> Iterator[Part]:
        if role == "assistant":
            yield from answer_parts(text, scene)
        elif role == "user" and (not scene.pictures or is_path(text)):
            yield scene.picture(text)
        else:
            yield plain(text)

    return read_turns(row, reading, parts_of)


def is_path(text: str) -> bool:
    """Whether a text is the path of a picture and nothing else."""
    return _PATH.fullmatch(text.strip()) is not None


FORMAT = Format(
    name="picture-path",
    looks='"conversations": [{"role": "user", "value": "path"}, ...], the question by --prompt',
    keys=frozenset({"conversations", "role", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
)
