"""Thoughts of a model that thinks before it answers, kept apart from its answers.

A turn is `<think>`, newline, the thought, newline, `</think>`, two newlines, the answer (the chat
template of Qwen3-VL's Thinking edition). The prompt ends after `<think>` and its newline. Where
`</think>` comes more than once, the answer begins after the last, as in the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finesight.data.sample import Part, TextPart

OPENED = "<think>\n"
CLOSED = "\n</think>\n\n"
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a turn says, both of text and boxes; `thought` is None where nothing tells the two
    apart."""

    thought: tuple[Part, ...] | None
    answer: tuple[Part, ...]


def apart(content: Sequence[Part]) -> Spoken:
    """A turn as data hold it: its thought ends with `</think>`, and may begin with `<think>`.
    Newlines around both are no part of them."""
    closing = [n for n, part in enumerate(content) if isinstance(part, TextPart) and _closes(part)]
    if not closing:
        return Spoken(None, tuple(content))
    at = closing[-1]
    part = content[at]
    assert isinstance(part, TextPart), f"a thought that ends in a {part.type}"
    before, _, after = part.text.rpartition(_CLOSE)
    thought = [*content[:at], TextPart(text=before.rstrip("\n"))]
    first = thought[0]
    if isinstance(first, TextPart):
        opened = first.text.lstrip().removeprefix(_OPEN)
        thought[0] = TextPart(text=opened.lstrip("\n"))
    return Spoken(tuple(thought), (TextPart(text=after.lstrip("\n")), *content[at + 1 :]))


def _closes(part: TextPart) -> bool:
    return _CLOSE in part.text


def generated(text: str) -> tuple[str, str]:
    """Thought and answer of what follows a prompt that ends in an open thought. Without its end all
    of it is thought, and there is no answer."""
    thought, closed, answer = text.rpartition(_CLOSE)
    return (thought.strip("\n"), answer.lstrip("\n")) if closed else (text.strip("\n"), "")
