"""The format of the first Qwen-VL: pictures in `<img>`, boxes in `<box>` on a grid of 1000.

{"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\\nWhere is the dog?"},
                   {"from": "assistant", "value": "<ref>a dog</ref><box>(88,99),(500,700)</box>"}]}

Any number of turns and pictures. `Picture 1:` and the line break after a picture are dropped, as
each family writes its own. A box belongs to the picture that came up last before it, in any turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    Reading,
    Scene,
    Writing,
    pieces,
    plain,
    refuse_unread,
)
from finesight.data.formats.turns import read_turns, said_in, turns_of
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.sample import BoxPart, ImagePart, Message, Part, Role
from finesight.errors import UserError

_POINT = r"\(\s*[\d.]+\s*,\s*[\d.]+\s*\)"
_WORDS = r"(?s:(?:(?!</?ref>).)*)"
_BOX = rf"<box>\s*{_POINT}\s*,\s*{_POINT}\s*</box>"
MARK = re.compile(
    r"(?:Picture \d+:\s*)?<img>(?P<path>[^<]*)</img>\n?"
    rf"|(?:<ref>(?P<label>{_WORDS})</ref>)?(?P<boxes>(?:{_BOX})+)"
    rf"|<ref>(?P<words>{_WORDS})</ref>"
)
GRID = BoxForm(format="xyxy", units="1000")


def detect(records: Sequence[Record]) -> str | None:
    """A picture, box or reference in Qwen-VL's marks, in any turn."""
    texts = (text for record in records for _, text in said_in(record))
    first = next((match[0] for text in texts for match in MARK.finditer(text)), None)
    return f"a turn holds {first.strip()[:60]!r}" if first else None


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)

    def parts_of(role: Role, text: str) -> Iterator[Part]:
        for piece in pieces(text, MARK):
            if isinstance(piece, str):
                yield plain(piece)
            elif piece["path"] is not None:
                yield scene.picture(piece["path"])
            elif piece["boxes"] is None:
                yield plain(piece["words"])
            else:
                for box in re.findall(_BOX, piece["boxes"]):
                    yield scene.box(re.findall(r"[\d.]+", box), piece["label"], GRID)

    turns = turns_of(row.record)
    case = read_turns(row, reading, turns, parts_of, "conversations", "system")
    if not scene.pictures:
        refuse_unread(row.record, PICTURE_KEYS)
    return case


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Turns in the marks of the first Qwen-VL, boxes on its grid of whole numbers up to 999."""

    def record_of(located: Located) -> Record:
        written = _Written(located, writing)
        turns = [
            {
                "from": message.role,
                "value": "".join(
                    written.text(message, place) for place in range(len(message.content))
                ),
            }
            for message in located.sample.messages
        ]
        return texts.record(located, writing, {"conversations": turns})

    yield from texts.rows(samples, record_of)


class _Written:
    """What stands for the parts of one sample, which has shown `shown` pictures so far."""

    def __init__(self, located: Located, writing: Writing) -> None:
        self._located, self._writing = located, writing
        self._shown: list[Path] = []

    def text(self, message: Message, place: int) -> str:
        """The part at `place` of a message as text."""
        part = message.content[place]
        if not isinstance(part, BoxPart):
            text = texts.asked(part, self._picture)
            return text if isinstance(part, ImagePart) else _markless(text)
        before = message.content[place - 1] if place else None
        label = before.label if isinstance(before, BoxPart) else None
        if part.image != len(self._shown) - 1 or (label is not None and part.label is None):
            raise UserError(
                f"a box in picture number {part.image} after {len(self._shown)} pictures, or one"
                " without a label after one with",
                expected="boxes in the picture before them, and labels for all in a row",
                remedy="export to ms-swift or samples, or leave the sample out",
            )
        name = None if part.label is None else _markless(plain(part.label).text)
        return ("" if name is None else f"<ref>{name}</ref>") + self._box(part)

    def _picture(self, part: ImagePart) -> str:
        self._shown.append(self._located.path(part.image))
        name = _markless(self._writing.name(self._shown[-1]))
        return f"Picture {len(self._shown)}: <img>{name}</img>\n"

    def _box(self, part: BoxPart) -> str:
        size = self._writing.size(self._shown[-1])
        sides = (size[1], size[0], size[1], size[0])
        exact = [number * 1000 / side for number, side in zip(part.xyxy, sides, strict=True)]
        x1, y1, x2, y2 = (min(round(number), 999) for number in exact)
        if x1 >= x2 or y1 >= y2:
            raise UserError(
                f"the box {list(part.xyxy)} is narrower than the grid's lines are apart",
                expected="boxes of more than a thousandth of the picture",
                remedy="export to ms-swift or samples, or leave the sample out",
            )
        moved = any(abs(a - b) > 1e-3 for a, b in zip(exact, (x1, y1, x2, y2), strict=True))
        self._writing.lost["boxes with exact corners (moved to a grid of 1000)"] += moved
        return f"<box>({x1},{y1}),({x2},{y2})</box>"


def _markless(text: str) -> str:
    """The text. Raises UserError where it, or a part of it, would be read as a mark."""
    if re.search(r"</?(?:img|ref|box)>", text):
        raise UserError(
            f"the mark in {text[:60]!r}",
            expected="texts, labels and names without <img>, <ref> and <box>",
            remedy="export to ms-swift or samples, or leave the sample out",
        )
    return text


FORMAT = Format(
    name="qwen-vl",
    looks='"conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\n..."}]',
    keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
