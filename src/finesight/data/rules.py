"""What a sample must be beyond its types, wherever it comes from."""

from __future__ import annotations

import math

from finesight.data.boxes import ROUNDING, BadBox
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, VideoPart
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
    check_order(sample, where, answered=answered)
    for number, message in enumerate(sample.messages):
        _check_content(message, f"{where}, message {number}")
    pictures = sum(isinstance(part, ImagePart) for part in sample.parts())
    for part in sample.parts():
        if isinstance(part, BoxPart):
            _check_box(part, pictures, where)


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


def _check_content(message: Message, where: str) -> None:
    sees = any(isinstance(part, ImagePart | VideoPart) for part in message.content)
    if sees and message.role != "user":
        raise BadTurns(
            f"a picture in a turn of the {message.role}",
            where=where,
            expected="pictures in user turns: a model answers with text and boxes",
            remedy="move the picture to the user's turn",
        )
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    if len(texts) == len(message.content) and not "".join(texts).strip():
        raise BadTurns(
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
