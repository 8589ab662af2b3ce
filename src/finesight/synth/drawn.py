"""What a generated task gives: a picture, a question about it and the right answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart

Corners = tuple[int, int, int, int]
"""A box in pixels, x1, y1, x2, y2: the first pixels of its ink and the first beyond."""

Said = str | BoxPart
"""A piece of a question or an answer."""


@dataclass(frozen=True)
class Drawn:
    """A picture (RGB), what is asked about it and what is to be said.

    `kind` names the measure that the answer is for; `meta` holds notes for the sample.
    """

    picture: Image.Image
    question: tuple[Said, ...]
    answer: tuple[Said, ...]
    kind: str
    meta: dict[str, Any] = field(default_factory=dict)

    def as_sample(self, identity: str, picture: str) -> Sample:
        """A sample of one question; `picture` is the path of the picture's file."""
        asked = (ImagePart(image=picture), *_parts(self.question))
        return Sample(
            id=identity,
            messages=(
                Message(role="user", content=asked),
                Message(role="assistant", content=_parts(self.answer)),
            ),
            meta={"kind": self.kind, **self.meta},
        )


def boxed(label: str | None, corners: Corners) -> BoxPart:
    """A box of the picture as a piece of a question or an answer."""
    x1, y1, x2, y2 = corners
    return BoxPart(label=label, xyxy=(float(x1), float(y1), float(x2), float(y2)))


def _parts(said: Iterable[Said]) -> tuple[TextPart | BoxPart, ...]:
    return tuple(TextPart(text=piece) if isinstance(piece, str) else piece for piece in said)
