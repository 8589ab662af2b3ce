"""The list of turns under `conversations` that several formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Literal

from finesight.data.case import Case, case_of
from finesight.data.formats.format import Reading, refuse_unread
from finesight.data.rows import Record, Row
from finesight.data.sample import Message, Part
from finesight.errors import UserError

Role = Literal["system", "user", "assistant"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
SPEAKER_KEYS = ("from", "role")


def read_turns(
    row: Row, reading: Reading, parts_of: Callable[[Role, str], Iterator[Part]], *read: str
) -> Case:
    """The case that a row's turns make, each one's text read by `parts_of`.

    `read` names the keys that `parts_of` uses itself; other keys are kept as notes.
    """
    refuse_unread(row.record)
    messages: list[Message] = []
    asked = False
    for role, text in _turns_of(row.record):
        parts = tuple(parts_of(role, text))
        if role == "user" and not asked:
            parts, asked = reading.asked(parts), True
        messages.append(Message(role=role, content=parts))
    return case_of(row.id, messages, notes_of(row.record, "conversations", "system", *read))


def _turns_of(record: Record) -> list[tuple[Role, str]]:
    """Who says what, the record's own system prompt first. Raises UserError for other shapes."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"conversations is {str(turns)[:60]!r}",
            expected="a list of turns",
            remedy="correct the row",
        )
    system = record.get("system")
    start: list[tuple[Role, str]] = [("system", str(system))] if system else []
    return start + [_turn(turn) for turn in turns]


def _turn(turn: object) -> tuple[Role, str]:
    if isinstance(turn, dict):
        role, text = _role(turn), turn.get("value")
        if role is not None and isinstance(text, str):
            return role, text
    raise UserError(
        f"the turn {str(turn)[:80]}",
        expected=f"{{from: ..., value: text}} said by one of {', '.join(ROLES)}",
        remedy="correct the row",
    )


def _role(turn: Record) -> Role | None:
    speaker = next((turn[key] for key in SPEAKER_KEYS if key in turn), None)
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def said_in(record: Record) -> list[tuple[Role | None, str]]:
    """Who says what in a record's turns, to tell formats apart by.

    Turns without text are passed over here; they are refused, with their row, when it is read.
    """
    turns = record.get("conversations")
    return [
        (_role(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def notes_of(record: Record, *read: str) -> Record:
    """What a record holds beyond its id and the keys that were read, as JSON data."""
    notes = {key: value for key, value in record.items() if key not in ("id", *read)}
    return dict(json.loads(json.dumps(notes, default=str)))
