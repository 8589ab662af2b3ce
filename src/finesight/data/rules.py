"""What a sample must be beyond its types, wherever it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finesight.data.boxes import ROUNDING, BadBox
from finesight.data.limits import (
    MAX_ANSWERS,
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    check_count,
)
from finesight.data.sample import BoxPart, Message, Sample
from finesight.errors import UserError

MAX_LISTED_ROLES = 10
"""Roles that an error message lists; it counts the others."""


class BadTurns(UserError):
    """Turns out of order, without an answer or without content."""


class EmptyAnswer(BadTurns):
    """A row whose answer is not there."""


def check_sample(sample: Sample, where: str, *, answered: bool = True) -> None:
    """Refuse, as UserError at `where`, a sample that cannot be learned from or measured on.

    Messages are an optional system message, then user and assistant in turn, starting with the
    user and, when `answered`, ending with the assistant (prediction needs no answer). Pictures
    stand in user turns; boxes have an area and name a picture of the sample. Whether they lie
    inside of it needs the picture's header: `finesight data import` and the renderer see to it.
    """
    check_messages(sample.messages, sample.references, where, answered=answered)


def check_messages(
    messages: Sequence[Message], references: Sequence[str], where: str, *, answered: bool = True
) -> None:
    """Refuse the messages and references of a sample as `check_sample` does."""
    check_limits(messages, references, where)
    check_order(messages, where, answered=answered)
    pictures, boxes = 0, list[BoxPart]()
    for number, message in enumerate(messages):
        is_said = is_shown = False
        for part in message.content:
            if part.type == "text":
                is_said = is_said or (part.text != "" and not part.text.isspace())
            elif part.type == "box":
                boxes.append(part)
            else:
                is_shown = True
                pictures += part.type == "image"
        if is_shown and message.role != "user":
            raise _shown_by_another(message, f"{where}, message {number}")
        if not (is_said or is_shown or any(part.type == "box" for part in message.content)):
            raise _empty(message, f"{where}, message {number}")
    for box in boxes:
        _check_box(box, pictures, where)


def check_limits(messages: Sequence[Message], references: Sequence[str], where: str) -> None:
    """Refuse a sample of too many messages, parts or boxes. Raises TooMany at `where`."""
    check_count(len(messages), MAX_MESSAGES, "messages", where)
    check_count(len(references), MAX_ANSWERS, "references", where)
    parts = 0
    for message in messages:
        parts += len(message.content)
    if parts > MAX_BOXES:
        boxes = sum(part.type == "box" for message in messages for part in message.content)
        check_count(boxes, MAX_BOXES, "boxes", where)
        check_count(parts, MAX_PARTS, "parts", where)


def check_order(messages: Sequence[Message], where: str, *, answered: bool = True) -> None:
    """Refuse, as BadTurns, roles that are not in the order that `check_sample` speaks of."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    in_turn = turns[::2].count("user") + turns[1::2].count("assistant")
    if not turns or in_turn < len(turns):
        raise BadTurns(
            f"the messages' roles are {_listed(roles)}",
            where=where,
            expected="an optional system, then user and assistant in turn, starting with user",
            remedy="put the messages in order; join two turns of the same role into one",
        )
    if answered and turns[-1] != "assistant":
        raise BadTurns(
            f"the messages' roles are {_listed(roles)}: there is no answer at the end",
            where=where,
            expected="an assistant message at the end",
            remedy="add the answer, or leave the sample out (only prediction needs no answer)",
        )


def _listed(roles: Sequence[str]) -> str:
    more = len(roles) - MAX_LISTED_ROLES
    return ", ".join(roles[:MAX_LISTED_ROLES]) + (f" and {more} more" if more > 0 else "")


def _shown_by_another(message: Message, where: str) -> BadTurns:
    return BadTurns(
        f"a picture in a turn of the {message.role}",
        where=where,
        expected="pictures in user turns: a model answers with text and boxes",
        remedy="move the picture to the user's turn",
    )


def _empty(message: Message, where: str) -> BadTurns:
    return BadTurns(
        f"an empty turn of the {message.role}",
        where=where,
        expected="some text, a picture or a box",
        remedy="fill it in, or leave the sample out",
    )


def _check_box(box: BoxPart, pictures: int, where: str) -> None:
    if box.image >= pictures:
        raise BadBox(
            f"a box in picture number {box.image}, counted from 0",
            where=where,
            expected=f"a number below {pictures}, the sample's pictures",
            remedy="correct the box's `image`, or add the picture",
        )
    x1, y1, x2, y2 = box.xyxy
    if not all(map(math.isfinite, box.xyxy)) or not (-ROUNDING <= x1 < x2 and -ROUNDING <= y1 < y2):
        raise BadBox(
            f"the box {list(box.xyxy)}",
            where=where,
            expected="[x1, y1, x2, y2] in pixels with 0 <= x1 < x2 and 0 <= y1 < y2",
            remedy="boxes of another form are turned into this one by `finesight data import`",
        )
