"""From the messages of a request to a sample, as every other question is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from finesight.data import sample as data
from finesight.data.rules import check_sample
from finesight.serve.errors import Refused
from finesight.serve.schema import (
    AssistantMessage,
    FilePart,
    ImagePart,
    Message,
    Question,
    TextPart,
    Tool,
    ToolMessage,
    UserMessage,
)
from finesight.serve.tools import called_text, result_text, system_text

Turn = tuple[str, list[data.Part]]


def image_name(number: int) -> str:
    """Name of the file, in the folder of a request, that holds its image of that number."""
    return f"image-{number}"


def images_of(question: Question) -> Iterator[tuple[str, ImagePart | FilePart]]:
    """Images of a request in order, each with its place in the body."""
    for place, message in enumerate(question.messages):
        if isinstance(message, UserMessage) and not isinstance(message.content, str):
            for number, part in enumerate(message.content):
                if not isinstance(part, TextPart):
                    yield f"messages.{place}.content.{number}", part


def conversation(question: Question, system: str | None) -> data.Sample:
    """The messages as a sample, whose images are files named by `image_name`, from 1 on.

    Neighbouring messages of one role are one turn; results of tools are the user's. `system` is
    the model's own prompt, which tools stand behind where the request has none. Raises UserError
    for turns out of order, Refused where there is none.
    """
    numbers = itertools.count(1)
    turns: list[Turn] = []
    for message in question.messages:
        role, parts = _turn(message, numbers)
        if parts == [data.TextPart(text="")] and role == "assistant":
            # An answer of nothing, as a client sends it back: it says nothing.
            continue
        if turns and turns[-1][0] == role:
            parts = [*turns.pop()[1], data.TextPart(text="\n"), *parts]
        turns.append((role, parts))
    if not turns:
        raise Refused(400, f"{len(question.messages)} messages without content", "messages")
    tools = question.tools if question.tool_choice != "none" else None
    messages = [
        data.Message.model_validate({"role": role, "content": tuple(parts)})
        for role, parts in (_with_tools(turns, tools, system) if tools else turns)
    ]
    sample = data.Sample(id="question", messages=tuple(messages))
    check_sample(sample, "messages", answered=False)
    if messages[-1].role != "user":
        # To go on with an answer is not what the models were taught.
        raise Refused(
            400, f"the last of {len(messages)} turns is the {messages[-1].role}'s", "messages"
        )
    return sample


def _turn(message: Message, numbers: Iterator[int]) -> Turn:
    if isinstance(message, UserMessage):
        if isinstance(message.content, str):
            return "user", [data.TextPart(text=message.content)]
        parts: list[data.Part] = [
            data.TextPart(text=part.text)
            if isinstance(part, TextPart)
            else data.ImagePart(image=image_name(next(numbers)))
            for part in message.content
        ]
        return "user", parts
    text = _text(message.content)
    if isinstance(message, ToolMessage):
        return "user", [data.TextPart(text=result_text(text))]
    if isinstance(message, AssistantMessage):
        calls = called_text(message.tool_calls or [])
        both = f"{text}\n{calls}" if text and calls else text or calls
        return "assistant", [data.TextPart(text=both)]
    return "system", [data.TextPart(text=text)]


def _text(content: str | Sequence[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _with_tools(turns: list[Turn], tools: Sequence[Tool], system: str | None) -> list[Turn]:
    own = turns[0][0] == "system"
    said = "".join(p.text for p in turns[0][1] if isinstance(p, data.TextPart)) if own else system
    return [("system", [data.TextPart(text=system_text(said, tools))]), *turns[own:]]
