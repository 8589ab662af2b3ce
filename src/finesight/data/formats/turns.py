"""The lists of turns that several formats share: who says what, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from finesight.data.case import Case, case_of
from finesight.data.formats.format import (
    PICTURE_KEYS,
    UNREAD_KEYS,
    Reading,
    holds,
    listed,
    merged,
    refuse_unread,
)
from finesight.data.jsonl import json_data
from finesight.data.limits import MAX_MESSAGES, MAX_PARTS, check_count
from finesight.data.rows import Record, Row
from finesight.data.sample import Part, Role
from finesight.errors import UserError

Turn = tuple[Role, str]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
SPEAKER_KEYS = ("from", "role")
MORE_KEYS = ("loss", "loss_scale", "weight", "tool_calls", "function_call", "audio", "refusal")
"""What a turn may say beyond its text: tools, other media, and how much of it is learned."""

_UNNOTED = frozenset({"id", *UNREAD_KEYS})
_UNREAD = frozenset(UNREAD_KEYS)
_MORE = frozenset(MORE_KEYS)


def read_turns(
    row: Row,
    reading: Reading,
    turns: Sequence[Turn],
    parts_of: Callable[[Role, str], Iterator[Part]],
    *read: str,
) -> Case:
    """The case that turns make, each one's text read by `parts_of`.

    `read` names the keys of the row that are read; others are kept as notes, and those whose
    meaning would be lost are refused.
    """
    if not _UNREAD.isdisjoint(row.record):
        refuse_unread(row.record, _UNREAD.difference(read))
    check_count(len(turns), MAX_MESSAGES, "messages")
    messages: list[tuple[Role, tuple[Part, ...]]] = []
    asked = False
    for role, text in turns:
        parts = merged(parts_of(role, text))
        if role == "user" and not asked:
            parts, asked = reading.asked(parts), True
        messages.append((role, parts))
    return case_of(row.id, messages, notes_of(row.record, *read))


def turns_of(record: Record, key: str = "conversations") -> list[Turn]:
    """Who says what under `key`, the record's own system prompt first.

    Raises UserError for other shapes, and UnreadKey for turns that say more than their text.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{key} is {str(turns)[:60]!r}",
            expected="a list of turns",
            remedy="correct the row",
        )
    system = record.get("system")
    start: list[Turn] = [("system", str(system))] if system else []
    return start + [_turn(turn) for turn in turns]


def _turn(turn: object) -> Turn:
    if isinstance(turn, dict):
        role, text = role_of(turn), turn["value"] if "value" in turn else turn.get("content")
        if role is not None and isinstance(text, str):
            refuse_more(turn)
            return role, text
    raise UserError(
        f"the turn {str(turn)[:80]}",
        expected=f"{{from: ..., value: text}} said by one of {', '.join(ROLES)}",
        remedy="correct the row",
    )


def refuse_more(turn: Record) -> None:
    """Raise UnreadKey where a turn calls tools, or is not to be learned in full."""
    if not _MORE.isdisjoint(turn):
        refuse_unread({key: turn[key] for key in _MORE & turn.keys() if turn[key] != 1}, MORE_KEYS)


def role_of(turn: Record) -> Role | None:
    """Who speaks in a turn, if it is one of ours."""
    speaker = turn["from"] if "from" in turn else turn.get("role")
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def said_in(record: Record) -> list[tuple[Role | None, str]]:
    """Who says what in a record's turns, to tell formats apart by.

    Turns without text are passed over here; they are refused, with their row, when it is read.
    """
    turns = record.get("conversations")
    return [
        (role_of(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def pictures_named(record: Record) -> list[object]:
    """The pictures that a record names beside its texts, in order."""
    named: list[object] = []
    for key in PICTURE_KEYS:
        if key in record and holds(record[key]):
            named += listed(record[key])
    return named


def images_of(record: Record) -> list[object]:
    """The images that a record names beside its texts, in order. Raises TooMany."""
    named = pictures_named(record)
    check_count(len(named), MAX_PARTS, "images")
    return named


def history_of(record: Record) -> list[Turn]:
    """The earlier rounds under `history`, pairs of what the user and the assistant said."""
    turns: list[Turn] = []
    for pair in listed(record.get("history")):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"history with {str(pair)[:60]!r}",
                expected="pairs of texts, [question, answer]",
                remedy="correct the row",
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def notes_of(record: Record, *read: str) -> Record:
    """What a record holds beyond its id and the keys that were read, as JSON data.

    Keys that are refused where they hold anything are here only where they hold nothing. NaN, which
    JSON does not know and tables have for what is missing, becomes null.
    """
    notes = record.keys() - _UNNOTED
    notes.difference_update(read)
    if not notes:
        return {}
    return {str(key): json_data(value) for key, value in record.items() if key in notes}
