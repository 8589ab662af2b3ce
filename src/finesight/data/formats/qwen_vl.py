"""The format of the first Qwen-VL: pictures in `<img>`, boxes in `<box>` on a grid of 1000.

{"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\\nWhere is the dog?"},
                   {"from": "assistant", "value": "<ref>a dog</ref><box>(88,99),(500,700)</box>"}]}

Any number of turns and pictures. `Picture 1:` and the line break after a picture are dropped, as
each family writes its own. A box belongs to the picture that came up last before it, in any turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    Reading,
    Scene,
    pieces,
    plain,
    refuse_unread,
)
from finesight.data.formats.turns import Role, read_turns, said_in
from finesight.data.rows import Record, Row
from finesight.data.sample import Part

_POINT = r"\(\s*[\d.]+\s*,\s*[\d.]+\s*\)"
_BOX = rf"<box>\s*{_POINT}\s*,\s*{_POINT}\s*</box>"
MARK = re.compile(
    r"(?:Picture \d+:\s*)?<img>(?P<path>[^<]*)</img>\n?"
    rf"|(?:<ref>(?P<label>[^<]*)</ref>)?(?P<boxes>(?:{_BOX})+)"
    r"|<ref>(?P<words>[^<]*)</ref>"
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

    case = read_turns(row, reading, parts_of)
    if not scene.pictures:
        refuse_unread(row.record, PICTURE_KEYS)
    return case


FORMAT = Format(
    name="qwen-vl",
    looks='"conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\n..."}]',
    keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
)
