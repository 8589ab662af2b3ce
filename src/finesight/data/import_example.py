"""The intermediate form of an imported dataset row, before it becomes samples.

A row with several correct answers becomes several training samples, or one evaluation sample with
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finesight.data.sample import ContentPart, Message, Role, Sample, TextPart
from finesight.data.sample_validation import InvalidTurnsError


@dataclass(frozen=True, slots=True)
class ImportExample:
    """A question of a dataset row with all its correct answers.

    Attributes:
        prompt_messages: All messages except the last.
        answers: Correct contents of the last message, at least one.
        references: Further correct answers that are used only for scoring.
    """

    id: str
    prompt_messages: tuple[Message, ...]
    answers: tuple[tuple[ContentPart, ...], ...]
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def to_train_samples(self) -> list[Sample]:
        """Return one training sample per correct answer."""
        if len(self.answers) == 1:
            return [self._build_sample(self.id, self.answers[0], self.references)]
        return [
            self._build_sample(format_answer_id(self.id, answer_number), answer, self.references)
            for answer_number, answer in enumerate(self.answers, start=1)
        ]

    def to_eval_sample(self) -> Sample:
        """Return an evaluation sample with the first answer, and the others as references."""
        answer, *other_answers = self.answers
        references = (
            *(join_text(answer).rstrip("\n") for answer in other_answers),
            *self.references,
        )
        return self._build_sample(self.id, answer, references)

    def _build_sample(
        self, sample_id: str, answer: tuple[ContentPart, ...], references: tuple[str, ...]
    ) -> Sample:
        last = Message(role="assistant", content=answer)
        messages = (*self.prompt_messages, last)
        return Sample(id=sample_id, messages=messages, references=references, meta=self.meta)


def format_answer_id(name: str, number: int) -> str:
    """Return the sample ID of one answer (1-based) to a question with several answers."""
    return f"{name}-{number}"


def build_example(
    sample_id: str, messages: Sequence[tuple[Role, tuple[ContentPart, ...]]], meta: dict[str, Any]
) -> ImportExample:
    """Build an example from messages whose last message is the only answer.

    Args:
        sample_id: ID of the example.
        messages: Role and content of each message.
        meta: Metadata from the other keys of the row.

    Raises:
        InvalidTurnsError: The last message is not from the assistant.
    """
    if not messages or messages[-1][0] != "assistant":
        raise InvalidTurnsError(
            f"{len(messages)} messages without an answer at the end",
            expected="an assistant message at the end",
            remedy="add the answer, or remove the row",
        )
    turns = tuple(Message(role=role, content=content) for role, content in messages[:-1])
    return ImportExample(sample_id, turns, (messages[-1][1],), meta=meta)


def join_text(content: tuple[ContentPart, ...]) -> str:
    """Return the concatenated text parts of a message, without images and boxes."""
    return "".join(part.text for part in content if isinstance(part, TextPart))
