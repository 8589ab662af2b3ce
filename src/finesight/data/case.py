"""A question with all its right answers, before it is known whether to train or to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finesight.data.rules import BadTurns
from finesight.data.sample import Message, Part, Role, Sample, TextPart


@dataclass(frozen=True, slots=True)
class Case:
    """What one row of a foreign file says.

    `turns` are all messages but the last; `answers` are the right contents of the last, at least
    one; `references` are further right answers that serve scoring alone.
    """

    id: str
    turns: tuple[Message, ...]
    answers: tuple[tuple[Part, ...], ...]
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def for_training(self) -> list[Sample]:
        """One sample for each answer."""
        if len(self.answers) == 1:
            return [self._sample(self.id, self.answers[0], self.references)]
        return [
            self._sample(answer_id(self.id, number), answer, self.references)
            for number, answer in enumerate(self.answers, start=1)
        ]

    def for_evaluation(self) -> Sample:
        """One sample: the first answer is its last turn, the others' texts are references."""
        first, *others = self.answers
        references = (*(text_of(answer).rstrip("\n") for answer in others), *self.references)
        return self._sample(self.id, first, references)

    def _sample(self, name: str, answer: tuple[Part, ...], references: tuple[str, ...]) -> Sample:
        last = Message(role="assistant", content=answer)
        messages = (*self.turns, last)
        return Sample(id=name, messages=messages, references=references, meta=self.meta)


def answer_id(name: str, number: int) -> str:
    """Return the id of the sample with one of several answers, counted from 1."""
    return f"{name}-{number}"


def case_of(
    name: str, messages: Sequence[tuple[Role, tuple[Part, ...]]], meta: dict[str, Any]
) -> Case:
    """Build a case whose last message is its only answer.

    Args:
        name: The id of the case.
        messages: Role and content of each message.
        meta: Further fields of the row.

    Raises:
        BadTurns: The last message is not the assistant's.
    """
    if not messages or messages[-1][0] != "assistant":
        raise BadTurns(
            f"{len(messages)} messages without an answer at the end",
            expected="an assistant's message at the end",
            remedy="add the answer, or leave the row out",
        )
    turns = tuple(Message(role=role, content=content) for role, content in messages[:-1])
    return Case(name, turns, (messages[-1][1],), meta=meta)


def text_of(content: tuple[Part, ...]) -> str:
    """The words of a message, without its pictures and boxes."""
    return "".join(part.text for part in content if isinstance(part, TextPart))
