"""What a sample must be beyond its types, wherever it comes from."""

from __future__ import annotations

import math

from finesight.data.boxes import ROUNDING, BadBox
from finesight.data.limits import (
    MAX_ANSWERS,
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    check_count,
)
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart
from finesight.errors import UserError


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
    check_counts(sample, where)
    check_order(sample, where, answered=answered)
    pictures, boxes = 0, list[BoxPart]()
    for number, message in enumerate(sample.messages):
        is_said = is_shown = False
        for part in message.content:
            if isinstance(part, TextPart):
                is_said = is_said or (part.text != "" and not part.text.isspace())
            elif isinstance(part, BoxPart):
                boxes.append(part)
            else:
                is_shown = True
                pictures += isinstance(part, ImagePart)
        if is_shown and message.role != "user":
            raise _shown_by_another(message, f"{where}, message {number}")
        if not (is_said or is_shown) and not any(isinstance(p, BoxPart) for p in message.content):
            raise _empty(message, f"{where}, message {number}")
    for box in boxes:
        _check_box(box, pictures, where)


def check_counts(sample: Sample, where: str) -> None:
    """Refuse a sample of too many messages, parts or boxes. Raises TooMany at `where`."""
    check_count(len(sample.messages), MAX_MESSAGES, "messages", where)
    parts = sum(len(message.content) for message in sample.messages)
    if parts > MAX_BOXES:
        check_count(sum(isinstance(p, BoxPart) for p in sample.parts()), MAX_BOXES, "boxes", where)
        check_count(parts, MAX_PARTS, "parts", where)
    check_count(len(sample.references), MAX_ANSWERS, "references", where)


def check_order(sample: Sample, where: str, *, answered: bool = True) -> None:
    """Refuse, as BadTurns, roles that are not in the order that `check_sample` speaks of."""
    roles = [message.role for message in sample.messages]
    turns = roles[1:] if roles[0] == "system" else roles
    in_turn = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))
    if not turns or not in_turn:
        raise BadTurns(
            f"the messages' roles are {', '.join(roles)}",
            where=where,
            expected="an optional system, then user and assistant in turn, starting with user",
            remedy="put the messages in order; join two turns of the same role into one",
        )
    if answered and turns[-1] != "assistant":
        raise BadTurns(
            f"the messages' roles are {', '.join(roles)}: there is no answer at the end",
            where=where,
            expected="an assistant message at the end",
            remedy="add the answer, or leave the sample out (only prediction needs no answer)",
        )


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
