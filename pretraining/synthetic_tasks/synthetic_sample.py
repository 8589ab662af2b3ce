"""Output of synthetic tasks: an image with questions and correct answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

from finesight.samples.sample import BoxPart, ImagePart, Message, Sample, TextPart
from synthetic_tasks.canvas import PixelBox

ContentPart = str | BoxPart
"""Part of a question or an answer: text or a box."""


class QuestionAnswer(NamedTuple):
    """A question about an image and its correct answer.

    `task_kind` is the question type, which selects the metric of the answer.
    """

    question: tuple[ContentPart, ...]
    answer: tuple[ContentPart, ...]
    task_kind: str


QuestionSampler = Callable[[random.Random], QuestionAnswer]
"""Function that samples a question about an image, with its answer."""


@dataclass(frozen=True)
class SyntheticSample:
    """A synthetic RGB image with one or more questions and their answers.

    Attributes:
        task_kind: Type of the first question.
        meta: Metadata of the sample.
        extra_turns: Questions and answers after the first.
        question_sampler: Samples further questions about the image; None if there are none.
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
        """Create a sample with one question, drawn from `question_sampler`."""
        return cls(image, *question_sampler(rng), question_sampler=question_sampler)

    def add_questions(self, num_questions: int, rng: random.Random) -> SyntheticSample:
        """Return the sample with up to `num_questions` further questions.

        Questions whose answer occurs already are omitted.
        """
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
        """Convert the image and all turns to a training sample.

        `image_path` is the path of the image file that the sample refers to.
        """
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
    """Convert a bounding box in pixels to a part of a question or an answer."""
    x1, y1, x2, y2 = box
    return BoxPart(label=label, xyxy=(float(x1), float(y1), float(x2), float(y2)))


def _to_sample_parts(parts: Iterable[ContentPart]) -> tuple[TextPart | BoxPart, ...]:
    return tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)
