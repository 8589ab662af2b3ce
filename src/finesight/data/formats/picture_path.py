"""Turns in which the user's text is a picture's path and nothing else.

{"conversations": [{"role": "user", "value": "LaTeX_OCR/0.jpg"},
                   {"role": "assistant", "value": "x ^ { 2 }"}]}

What the model is asked stands nowhere in such a file: `--prompt` says it. Later user turns are
text unless they, too, are a path. See `boxed_text` for what is read of boxes in the answers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import Format, Reading, Scene, Writing, worded
from finesight.data.formats.turns import read_turns, said_in, turns_of
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.sample import ImagePart, Part, Role, TextPart
from finesight.errors import UserError

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
            yield worded(text)

    turns = turns_of(row.record)
    return read_turns(row, reading, turns, parts_of, "conversations", "system")


def is_path(text: str) -> bool:
    """Whether a text is the path of a picture and nothing else."""
    return _PATH.fullmatch(text.strip()) is not None


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Turns, the first a picture's path; what is asked has no place and is told to the user.

    Raises UserError for samples that ask different things, and for one whose question is not one
    picture and then text.
    """
    prompts: set[str] = set()

    def record_of(located: Located) -> Record:
        shown = texts.Shown(located, writing)
        said = texts.turns(located, shown)
        place = next(place for place, (role, _) in enumerate(said) if role == "user")
        picture, prompt = _picture_and_prompt(located.sample.messages[place].content)
        name = writing.name(located.path(picture.image))
        prompts.add(prompt)
        later = [text for role, text in said[place + 1 :] if role == "user"]
        unfit = len(shown.names) > 1 or not is_path(name) or any(map(is_path, later))
        if unfit or len(prompts) > 1:
            raise _unfit(f"the question {prompt[:60]!r} about {name!r}")
        said[place] = ("user", name)
        turns = [{"from": role, "value": text} for role, text in said]
        return texts.record(located, writing, {"conversations": turns})

    yield from texts.rows(samples, record_of)
    texts.note_boxes(samples, writing)
    writing.notes.append(
        f"the rows do not say what is asked; --prompt {shlex.quote(prompts.pop())} does"
    )


def _picture_and_prompt(asked: tuple[Part, ...]) -> tuple[ImagePart, str]:
    if asked and isinstance(asked[0], ImagePart):
        text = "".join(part.text for part in asked[1:] if isinstance(part, TextPart))
        if all(isinstance(part, TextPart) for part in asked[1:]):
            return asked[0], text
    raise _unfit(f"a question of {', '.join(part.type for part in asked)}")


def _unfit(what: str) -> UserError:
    return UserError(
        what,
        expected="one picture with a usual suffix, then the same question in every sample",
        remedy="export to conversations, which has a place for both",
    )


FORMAT = Format(
    name="picture-path",
    looks='"conversations": [{"role": "user", "value": "path"}, ...], the question by --prompt',
    keys=frozenset({"conversations", "role", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
