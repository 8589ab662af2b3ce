"""Splitting of assistant turns into reasoning and answer, for models with reasoning.

A turn is `<think>`, newline, reasoning, newline, `</think>`, two newlines, answer (chat template of
Qwen3-VL Thinking). The prompt ends after `<think>` and its newline. If `</think>` occurs several
times, the answer in a turn of a sample starts after the last one, as in the template. The answer of
a completion starts after the first one, as in vLLM, because it is streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finesight.data.sample import ContentPart, TextPart

THINK_START = "<think>\n"
THINK_END = "\n</think>\n\n"
_THINK_TAG, _THINK_END_TAG = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ReasoningAndAnswer:
    """Content parts of an assistant turn, split into reasoning and answer.

    `reasoning` is None if the turn contains no `</think>`.
    """

    reasoning: tuple[ContentPart, ...] | None
    answer: tuple[ContentPart, ...]


def split_reasoning(content: Sequence[ContentPart]) -> ReasoningAndAnswer:
    """Split the content of an assistant turn at its last `</think>`.

    A leading `<think>` and newlines around both parts are removed.
    """
    end_indices = [
        index
        for index, part in enumerate(content)
        if isinstance(part, TextPart) and _has_end_tag(part)
    ]
    if not end_indices:
        return ReasoningAndAnswer(None, tuple(content))
    end_index = end_indices[-1]
    part = content[end_index]
    assert isinstance(part, TextPart), f"reasoning that ends in a {part.type} part"
    before, _, after = part.text.rpartition(_THINK_END_TAG)
    reasoning = [*content[:end_index], TextPart(text=before.rstrip("\n"))]
    first = reasoning[0]
    if isinstance(first, TextPart):
        reasoning_text = first.text.lstrip().removeprefix(_THINK_TAG)
        reasoning[0] = TextPart(text=reasoning_text.lstrip("\n"))
    return ReasoningAndAnswer(
        tuple(reasoning), (TextPart(text=after.lstrip("\n")), *content[end_index + 1 :])
    )


def _has_end_tag(part: TextPart) -> bool:
    return _THINK_END_TAG in part.text


def parse_reasoning(text: str) -> tuple[str, str]:
    """Split the text of a completion at its first `</think>` into reasoning and answer.

    The text starts within the reasoning, because the prompt already contains `<think>`. Without
    `</think>`, the answer is empty.
    """
    reasoning, _, answer = text.partition(_THINK_END_TAG)
    return reasoning.strip("\n"), answer.lstrip("\n")
