"""Output of a synthetic task: an image, a question and the correct answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart

PixelBox = tuple[int, int, int, int]
"""A box in pixels, x1, y1, x2, y2: the first ink pixels, inclusive, and the last, exclusive."""

ContentPart = str | BoxPart
"""A part of a question or an answer."""


class QuestionAnswer(NamedTuple):
    """A question and its answer; `task_kind` names the metric of the answer."""

    question: tuple[ContentPart, ...]
    answer: tuple[ContentPart, ...]
    task_kind: str


QuestionSampler = Callable[[random.Random], QuestionAnswer]
"""Samples one of the questions about an image."""


@dataclass(frozen=True)
class SyntheticSample:
    """An RGB image with a question and its answer.

    `extra_turns` follow the first turn; `question_sampler` samples further ones. `meta` is the
    metadata of the sample.
    """

    image: Image.Image
    question: tuple[ContentPart, ...]
    answer: tuple[ContentPart, ...]
    task_kind: str
    meta: dict[str, Any] = field(default_factory=dict)
    extra_turns: tuple[QuestionAnswer, ...] = ()
    question_sampler: QuestionSampler | None = None

    @classmethod
    def from_sampler(
        cls, image: Image.Image, question_sampler: QuestionSampler, rng: random.Random
    ) -> SyntheticSample:
        """Create a sample with one question about the image."""
        return cls(image, *question_sampler(rng), question_sampler=question_sampler)

    def add_questions(self, num_questions: int, rng: random.Random) -> SyntheticSample:
        """Add up to `num_questions` further questions whose answers were not given before."""
        seen_answers = {self.answer}
        extra_turns = []
        for turn in (
            [self.question_sampler(rng) for _ in range(num_questions)]
            if self.question_sampler
            else []
        ):
            if turn.answer not in seen_answers:
                seen_answers.add(turn.answer)
                extra_turns.append(turn)
        return replace(self, extra_turns=tuple(extra_turns))

    def to_sample(self, sample_id: str, image_path: str) -> Sample:
        """Convert to a sample of all turns with the image at `image_path`."""
        messages = [
            Message(
                role="user", content=(ImagePart(image=image_path), *_to_sample_parts(self.question))
            ),
            Message(role="assistant", content=_to_sample_parts(self.answer)),
        ]
        for turn in self.extra_turns:
            messages.append(Message(role="user", content=_to_sample_parts(turn.question)))
            messages.append(Message(role="assistant", content=_to_sample_parts(turn.answer)))
        meta = {"kind": self.task_kind, **self.meta}
        return Sample(id=sample_id, messages=tuple(messages), meta=meta)


def make_box_part(label: str | None, box: PixelBox) -> BoxPart:
    """Create a box part of a question or an answer."""
    x1, y1, x2, y2 = box
    return BoxPart(label=label, xyxy=(float(x1), float(y1), float(x2), float(y2)))


def _to_sample_parts(parts: Iterable[ContentPart]) -> tuple[TextPart | BoxPart, ...]:
    return tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)
