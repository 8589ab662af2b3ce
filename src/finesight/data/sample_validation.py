"""Validate the content of samples: role order, images, boxes and size limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finesight.data.boxes import MAX_OVERHANG_PX, InvalidBoxError
from finesight.data.limits import (
    MAX_ANSWERS,
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    check_limit,
)
from finesight.data.sample import BoxPart, Message, Sample
from finesight.errors import UserError

MAX_LISTED_ROLES = 10
"""Maximum number of roles listed in an error message; further roles are counted."""


class InvalidTurnsError(UserError):
    """Raised when a sample has an invalid role order, no answer, or an empty turn."""


class EmptyAnswerError(InvalidTurnsError):
    """Raised when a dataset row has no answer."""


def validate_sample(sample: Sample, where: str, *, require_answer: bool = True) -> None:
    """Raise UserError if a sample is invalid for training or evaluation.

    Messages are an optional system message, followed by alternating user and assistant messages
    that start with the user. Images are in user turns. Boxes have a positive area and a valid image
    index. Whether a box is inside its image is checked by `finesight data import` and the renderer,
    which read the image header.

    Args:
        sample: The sample.
        where: Location of the sample in the error message.
        require_answer: Require an assistant message at the end.
    """
    check_messages(sample.messages, sample.references, where, answered=require_answer)


def check_messages(
    messages: Sequence[Message], references: Sequence[str], where: str, *, answered: bool = True
) -> None:
    """Validate the messages and references of a sample; see `validate_sample`."""
    check_limits(messages, references, where)
    validate_roles(messages, where, require_answer=answered)
    num_images, boxes = 0, list[BoxPart]()
    for number, message in enumerate(messages):
        has_text = has_visual = False
        for part in message.content:
            if part.type == "text":
                has_text = has_text or (part.text != "" and not part.text.isspace())
            elif part.type == "box":
                boxes.append(part)
            else:
                has_visual = True
                num_images += part.type == "image"
        if has_visual and message.role != "user":
            raise _shown_by_another(message, f"{where}, message {number}")
        if not (has_text or has_visual or any(part.type == "box" for part in message.content)):
            raise _empty(message, f"{where}, message {number}")
    for box in boxes:
        _validate_box(box, num_images, where)


def check_limits(messages: Sequence[Message], references: Sequence[str], where: str) -> None:
    """Reject a sample with too many messages, references, parts or boxes.

    Raises:
        LimitExceededError: A limit is exceeded. `where` is the location in the error message.
    """
    check_limit(len(messages), MAX_MESSAGES, "messages", where)
    check_limit(len(references), MAX_ANSWERS, "references", where)
    parts = 0
    for message in messages:
        parts += len(message.content)
    if parts > MAX_BOXES:
        boxes = sum(part.type == "box" for message in messages for part in message.content)
        check_limit(boxes, MAX_BOXES, "boxes", where)
        check_limit(parts, MAX_PARTS, "parts", where)


def validate_roles(messages: Sequence[Message], where: str, *, require_answer: bool = True) -> None:
    """Raise InvalidTurnsError if the messages have an invalid role order; see `validate_sample`."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    is_alternating = turns[::2].count("user") + turns[1::2].count("assistant")
    if not turns or is_alternating < len(turns):
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}",
            where=where,
            expected="an optional system, then user and assistant in turn, starting with user",
            remedy="reorder the messages; merge consecutive turns of the same role",
        )
    if require_answer and turns[-1] != "assistant":
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}: no answer at the end",
            where=where,
            expected="an assistant message at the end",
            remedy="add the answer, or remove the sample (only prediction needs no answer)",
        )


def _format_roles(roles: Sequence[str]) -> str:
    more = len(roles) - MAX_LISTED_ROLES
    return ", ".join(roles[:MAX_LISTED_ROLES]) + (f" and {more} more" if more > 0 else "")


def _shown_by_another(message: Message, where: str) -> InvalidTurnsError:
    return InvalidTurnsError(
        f"an image in a turn of the {message.role}",
        where=where,
        expected="images in user turns: answers contain text and boxes only",
        remedy="move the image to a user turn",
    )


def _empty(message: Message, where: str) -> InvalidTurnsError:
    return InvalidTurnsError(
        f"an empty turn of the {message.role}",
        where=where,
        expected="text, an image or a box",
        remedy="add it, or remove the sample",
    )


def _validate_box(box: BoxPart, num_images: int, where: str) -> None:
    if box.image >= num_images:
        raise InvalidBoxError(
            f"a box in image {box.image} (0-based)",
            where=where,
            expected=f"an index below {num_images}, the images of the sample",
            remedy="correct the box's `image`, or add the image",
        )
    x1, y1, x2, y2 = box.xyxy
    if not all(map(math.isfinite, box.xyxy)) or not (
        -MAX_OVERHANG_PX <= x1 < x2 and -MAX_OVERHANG_PX <= y1 < y2
    ):
        raise InvalidBoxError(
            f"the box {list(box.xyxy)}",
            where=where,
            expected="[x1, y1, x2, y2] in pixels with 0 <= x1 < x2 and 0 <= y1 < y2",
            remedy="convert other box formats with `finesight data import`",
        )
