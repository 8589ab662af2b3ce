"""One record read by one format, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finesight.data.case import Case
from finesight.data.formats.format import Format, Reading
from finesight.data.pictures import Pictures
from finesight.data.rows import Row
from finesight.data.sample import BoxPart, ImagePart, Message, Part, TextPart


def read(form: Format, record: dict[str, Any], folder: Path, **said: Any) -> Case:
    """The case of a record whose pictures lie in `folder`; `said` are fields of Reading."""
    row = Row(number=3, place="line 3", record=record, stem="rows")
    (case,) = form.cases(row, Reading(Pictures(folder, folder / "out"), **said))
    return case


def brief(content: tuple[Part, ...]) -> list[object]:
    """Text as it is, a picture as the name of its file, a box as (picture, label, corners)."""
    return [_brief(part) for part in content]


def talk(case: Case) -> list[tuple[str, list[object]]]:
    """Role and content of every turn, the first answer last."""
    last = Message(role="assistant", content=case.answers[0])
    return [(message.role, brief(message.content)) for message in (*case.turns, last)]


def _brief(part: Part) -> object:
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, ImagePart):
        return Path(part.image)
    assert isinstance(part, BoxPart), f"a {part.type} part"
    return part.image, part.label, part.xyxy
