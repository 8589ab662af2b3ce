"""Parse lists of conversation turns, which several dataset formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    UNSUPPORTED_KEYS,
    ImportContext,
    as_list,
    has_value,
    merge_text_parts,
    reject_unsupported_keys,
)
from finesight.data.import_example import ImportExample, build_example
from finesight.data.jsonl import to_json_data
from finesight.data.limits import MAX_MESSAGES, MAX_PARTS, check_limit
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import ContentPart, Role
from finesight.errors import UserError

Turn = tuple[Role, str]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS = ("from", "role")
UNSUPPORTED_TURN_KEYS = (
    "loss",
    "loss_scale",
    "weight",
    "tool_calls",
    "function_call",
    "audio",
    "refusal",
)
"""Keys of a turn with unsupported content: tool calls, other media, and loss weights."""

_UNNOTED = frozenset({"id", *UNSUPPORTED_KEYS})
_UNREAD = frozenset(UNSUPPORTED_KEYS)
_MORE = frozenset(UNSUPPORTED_TURN_KEYS)


def build_turns_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[Turn],
    parse_text: Callable[[Role, str], Iterator[ContentPart]],
    *handled_keys: str,
) -> ImportExample:
    """Build a training example from the turns of a row.

    Keys of the row that are neither handled nor unsupported become metadata.

    Args:
        row: Dataset row.
        context: State of the import.
        turns: Role and text of each turn.
        parse_text: Function that parses a text into content parts, given its role.
        *handled_keys: Keys of the row that the format has parsed.
    """
    if not _UNREAD.isdisjoint(row.record):
        reject_unsupported_keys(row.record, _UNREAD.difference(handled_keys))
    check_limit(len(turns), MAX_MESSAGES, "messages")
    messages: list[tuple[Role, tuple[ContentPart, ...]]] = []
    has_prompt = False
    for role, text in turns:
        parts = merge_text_parts(parse_text(role, text))
        if role == "user" and not has_prompt:
            parts, has_prompt = context.add_prompt(parts), True
        messages.append((role, parts))
    return build_example(row.id, messages, collect_meta(row.record, *handled_keys))


def parse_turns(record: Record, key: str = "conversations") -> list[Turn]:
    """Return role and text of each turn under a key of a record.

    The system prompt of the record comes first.

    Raises:
        UserError: The value is not a list of turns.
        UnsupportedKeyError: A turn has content other than text.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{key} is {str(turns)[:60]!r}",
            expected="a list of turns",
            remedy="correct the row",
        )
    system = record.get("system")
    system_turns: list[Turn] = [("system", str(system))] if system else []
    return system_turns + [_parse_turn(turn) for turn in turns]


def _parse_turn(turn: object) -> Turn:
    if isinstance(turn, dict):
        role, text = get_role(turn), turn["value"] if "value" in turn else turn.get("content")
        if role is not None and isinstance(text, str):
            reject_unsupported_turn_keys(turn)
            return role, text
    raise UserError(
        f"the turn {str(turn)[:80]}",
        expected=f"{{from: ..., value: text}} from one of {', '.join(ROLES)}",
        remedy="correct the row",
    )


def reject_unsupported_turn_keys(turn: Record) -> None:
    """Raise UnsupportedKeyError if a turn has tool calls, other media, or a loss weight.

    A loss weight of 1 is accepted.
    """
    if not _MORE.isdisjoint(turn):
        reject_unsupported_keys(
            {key: turn[key] for key in _MORE & turn.keys() if turn[key] != 1}, UNSUPPORTED_TURN_KEYS
        )


def get_role(turn: Record) -> Role | None:
    """Return the role of a turn, or None if it is missing or unknown."""
    speaker = turn["from"] if "from" in turn else turn.get("role")
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def list_turn_texts(record: Record) -> list[tuple[Role | None, str]]:
    """Return role and text of each turn of a record, for format detection.

    Turns without text are omitted here and rejected when the row is parsed.
    """
    turns = record.get("conversations")
    return [
        (get_role(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def list_images(record: Record) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order."""
    named: list[object] = []
    for key in IMAGE_KEYS:
        if key in record and has_value(record[key]):
            named += as_list(record[key])
    return named


def list_checked_images(record: Record) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order.

    Raises:
        LimitExceededError: There are too many images.
    """
    named = list_images(record)
    check_limit(len(named), MAX_PARTS, "images")
    return named


def parse_history(record: Record) -> list[Turn]:
    """Return the earlier turns of a record, question-answer pairs under `history`."""
    turns: list[Turn] = []
    for pair in as_list(record.get("history")):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"history with {str(pair)[:60]!r}",
                expected="pairs of texts, [question, answer]",
                remedy="correct the row",
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def collect_meta(record: Record, *handled_keys: str) -> Record:
    """Return the keys of a record that are not parsed, as sample metadata.

    The ID, handled keys and unsupported keys are excluded. NaN, which tables use for missing
    values, becomes null.
    """
    notes = record.keys() - _UNNOTED
    notes.difference_update(handled_keys)
    if not notes:
        return {}
    return {str(key): to_json_data(value) for key, value in record.items() if key in notes}
