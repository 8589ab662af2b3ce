"""What a generated task gives: a picture, a question about it and the right answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart

Corners = tuple[int, int, int, int]
"""A box in pixels, x1, y1, x2, y2: the first pixels of its ink and the first beyond."""

Said = str | BoxPart
"""A piece of a question or an answer."""


class Turn(NamedTuple):
    """A question and its answer; `kind` names the measure that the answer is for."""

    question: tuple[Said, ...]
    answer: tuple[Said, ...]
    kind: str


Asking = Callable[[random.Random], Turn]
"""Asks one of the questions that fit a picture."""


@dataclass(frozen=True)
class Drawn:
    """A picture (RGB), what is asked about it and what is to be said.

    `further` turns follow the first; `asking` could think of more. `meta` holds notes for the
    sample.
    """

    picture: Image.Image
    question: tuple[Said, ...]
    answer: tuple[Said, ...]
    kind: str
    meta: dict[str, Any] = field(default_factory=dict)
    further: tuple[Turn, ...] = ()
    asking: Asking | None = None

    @classmethod
    def about(cls, picture: Image.Image, asking: Asking, rng: random.Random) -> Drawn:
        """The picture with one question about it."""
        return cls(picture, *asking(rng), asking=asking)

    def with_more(self, questions: int, rng: random.Random) -> Drawn:
        """With up to so many further questions, none of them for what was said already."""
        said = {self.answer}
        further = []
        for turn in [self.asking(rng) for _ in range(questions)] if self.asking else []:
            if turn.answer not in said:
                said.add(turn.answer)
                further.append(turn)
        return replace(self, further=tuple(further))

    def as_sample(self, identity: str, picture: str) -> Sample:
        """A sample of all turns; `picture` is the path of the picture's file."""
        messages = [
            Message(role="user", content=(ImagePart(image=picture), *_parts(self.question))),
            Message(role="assistant", content=_parts(self.answer)),
        ]
        for turn in self.further:
            messages.append(Message(role="user", content=_parts(turn.question)))
            messages.append(Message(role="assistant", content=_parts(turn.answer)))
        meta = {"kind": self.kind, **self.meta}
        return Sample(id=identity, messages=tuple(messages), meta=meta)


def boxed(label: str | None, corners: Corners) -> BoxPart:
    """A box of the picture as a piece of a question or an answer."""
    x1, y1, x2, y2 = corners
    return BoxPart(label=label, xyxy=(float(x1), float(y1), float(x2), float(y2)))


def _parts(said: Iterable[Said]) -> tuple[TextPart | BoxPart, ...]:
    return tuple(TextPart(text=piece) if isinstance(piece, str) else piece for piece in said)
