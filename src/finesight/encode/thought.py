"""Thoughts of a model that thinks before it answers, kept apart from its answers.

A turn is `<think>`, newline, the thought, newline, `</think>`, two newlines, the answer (the chat
template of Qwen3-VL's Thinking edition). The prompt ends after `<think>` and its newline.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENED = "<think>\n"
CLOSED = "\n</think>\n\n"
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a turn says: `thought` is None where nothing tells thought and answer apart."""

    thought: str | None
    answer: str


def apart(text: str) -> Spoken:
    """The turn of a conversation, as data hold it: a thought ends with `</think>`, and may begin
    with `<think>`. Newlines around both are no part of them."""
    before, close, after = text.partition(_CLOSE)
    if not close:
        return Spoken(None, text)
    thought = before.rpartition(_OPEN)[2].strip("\n")
    return Spoken(thought, after.lstrip("\n"))


def generated(text: str) -> Spoken:
    """What follows a prompt that ends in an open thought. Without its end all of it is thought, and
    there is no answer."""
    thought, _, answer = text.partition(_CLOSE)
    return Spoken(thought.strip("\n"), answer.lstrip("\n"))
