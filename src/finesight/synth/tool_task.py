"""Questions about synthetic images, with the tool calls that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finesight.samples.sample import ImagePart, Message, Sample, TextPart, ToolCallPart


@dataclass(frozen=True)
class ToolTask:
    """A question about an image, and the calls that a model makes before its answer.

    Attributes:
        sample: Question and answer, without calls. Image paths are relative to its file.
        calls: One call per turn.
    """

    sample: Sample
    calls: Sequence[ToolCallPart]


def build_task_sample(
    sample_id: str, image: str, question: str, answer: str, meta: dict[str, Any]
) -> Sample:
    """Build the sample of a question about an image, and its answer."""
    content = (ImagePart(image=image), TextPart(text=question))
    messages = (
        Message(role="user", content=content),
        Message(role="assistant", content=(TextPart(text=answer),)),
    )
    return Sample(id=sample_id, messages=messages, meta=meta)
