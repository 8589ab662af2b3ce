r"""Prompts in which `<image>` marks the positions of images and videos.

A literal `<image>` in the text of a question with images is written as `\<image>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from finesight.errors import UserError, format_count
from finesight.samples.sample import ContentPart, ImagePart, TextPart, VideoPart

IMAGE_MARK = "<image>"
ESCAPED_MARK = r"\<image>"

MediaPart = ImagePart | VideoPart

_MARK = re.compile(r"(?<!\\)<image>")
_ADJACENT_MARKS = re.compile(r"(?:(?<!\\)<image>)+")

REGION = "\ufffc"
"""Character for a box or tool call in a marked prompt, which nobody can type."""


def split_at_marks(prompt: str) -> list[str]:
    """Return the texts before, between and after the marks of a prompt, without escapes."""
    return [text.replace(ESCAPED_MARK, IMAGE_MARK) for text in _MARK.split(prompt)]


def count_marks(prompt: str) -> int:
    """Return the number of marks of a prompt."""
    return len(_MARK.findall(prompt))


def count_adjacent_marks(prompt: str) -> tuple[int, ...]:
    """Return the number of marks at each position between texts."""
    return tuple(count_marks(marks) for marks in _ADJACENT_MARKS.findall(prompt))


def join_adjacent_marks(prompt: str) -> str:
    """Replace adjacent marks by one, which stands for all images if it is the only one."""
    return _ADJACENT_MARKS.sub(IMAGE_MARK, prompt)


def remove_marks(prompt: str) -> str:
    """Return the text of a prompt without marks and escapes."""
    return "".join(split_at_marks(prompt))


def escape_marks(text: str) -> str:
    """Write each `<image>` of a text as a word of a prompt."""
    return text.replace(IMAGE_MARK, ESCAPED_MARK)


def can_hold(prompt: str, num_images: int) -> bool:
    """Return whether the marks of a prompt are positions for this number of images.

    Adjacent marks are positions for any number.
    """
    num_positions = len(count_adjacent_marks(prompt))
    if num_positions == 1:
        return num_images > 0
    return num_images == count_marks(prompt)


def write_marked_prompt(content: Sequence[ContentPart]) -> str:
    """Write the content of a question with a mark for each image and video."""
    pieces = []
    for part in content:
        if isinstance(part, TextPart):
            pieces.append(escape_marks(part.text))
        elif isinstance(part, MediaPart):
            pieces.append(IMAGE_MARK)
        else:
            pieces.append(REGION)
    return "".join(pieces)


def insert_images(prompt: str, media: Sequence[MediaPart]) -> tuple[ContentPart, ...]:
    """Replace the marks of a prompt by images, or a single position by all of them.

    Raises:
        UserError: The prompt has another number of marks.
    """
    if not can_hold(prompt, len(media)):
        raise UserError(
            f"{count_marks(prompt)} times {IMAGE_MARK} for {format_count(len(media), 'image')}",
            where="prompt",
            expected=f"{IMAGE_MARK} once for each image, or once for all of them",
            remedy=f"add images, or remove {IMAGE_MARK}; write {ESCAPED_MARK} if it is a word of"
            " the text",
        )
    if len(count_adjacent_marks(prompt)) == 1:
        prompt = join_adjacent_marks(prompt)
    texts = split_at_marks(prompt)
    groups = [media] if len(texts) == 2 else [[part] for part in media]
    content: list[ContentPart] = []
    # No image follows the last text.
    for text, group in zip(texts, [*groups, []], strict=True):
        if text:
            content.append(TextPart(text=text))
        content.extend(group)
    return tuple(content)
