"""Convert the messages of a chat completion request to a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from finesight.data.sample import ContentPart, ImagePart, Message, Sample, TextPart, validate_sample
from finesight.serve.api_errors import ApiError
from finesight.serve.chat_schema import (
    AssistantMessage,
    ChatCompletionRequest,
    ChatMessage,
    FileContent,
    ImageContent,
    TextContent,
    Tool,
    ToolMessage,
    UserMessage,
)
from finesight.serve.tool_calls import format_system_prompt, format_tool_calls, format_tool_result

MessageTurn = tuple[str, list[ContentPart]]


def get_image_name(image_number: int) -> str:
    """Return the file name of an image in the folder of its request."""
    return f"image-{image_number}"


def iter_images(
    chat_request: ChatCompletionRequest,
) -> Iterator[tuple[str, ImageContent | FileContent]]:
    """Yield (field path, image) pairs for all images of a request."""
    for message_index, message in enumerate(chat_request.messages):
        if isinstance(message, UserMessage) and not isinstance(message.content, str):
            for part_index, part in enumerate(message.content):
                if not isinstance(part, TextContent):
                    yield f"messages.{message_index}.content.{part_index}", part


def build_sample(chat_request: ChatCompletionRequest, system_prompt: str | None) -> Sample:
    """Convert the messages of a request to a sample.

    Its images are named by `get_image_name`, numbered from 1. Consecutive messages of one role
    become one turn, and tool results become user turns.

    Args:
        chat_request: Chat completion request.
        system_prompt: System prompt of the model, used with tools if the request has none.

    Raises:
        UserError: The order of the turns is invalid.
        ApiError: There is no turn, or the last one is not of the user.
    """
    image_counter = itertools.count(1)
    turns: list[MessageTurn] = []
    for message in chat_request.messages:
        role, parts = _convert_message(message, image_counter)
        if parts == [TextPart(text="")] and role == "assistant":
            # An empty answer that a client sends back.
            continue
        if turns and turns[-1][0] == role:
            parts = [*turns.pop()[1], TextPart(text="\n"), *parts]
        turns.append((role, parts))
    if not turns:
        raise ApiError(400, f"{len(chat_request.messages)} messages are empty", "messages")
    tools = chat_request.tools if chat_request.tool_choice != "none" else None
    messages = [
        Message.model_validate({"role": role, "content": tuple(parts)})
        for role, parts in (_add_tools_to_system(turns, tools, system_prompt) if tools else turns)
    ]
    sample = Sample(id="request", messages=tuple(messages))
    validate_sample(sample, "messages", require_answer=False)
    if messages[-1].role != "user":
        # The models are not trained to continue an answer.
        raise ApiError(
            400,
            f"the last turn is a {messages[-1].role} turn; expected a user turn",
            "messages",
        )
    return sample


def _convert_message(message: ChatMessage, image_counter: Iterator[int]) -> MessageTurn:
    if isinstance(message, UserMessage):
        if isinstance(message.content, str):
            return "user", [TextPart(text=message.content)]
        parts: list[ContentPart] = [
            TextPart(text=part.text)
            if isinstance(part, TextContent)
            else ImagePart(image=get_image_name(next(image_counter)))
            for part in message.content
        ]
        return "user", parts
    text = _join_text(message.content)
    if isinstance(message, ToolMessage):
        return "user", [TextPart(text=format_tool_result(text))]
    if isinstance(message, AssistantMessage):
        calls = format_tool_calls(message.tool_calls or [])
        both = f"{text}\n{calls}" if text and calls else text or calls
        return "assistant", [TextPart(text=both)]
    return "system", [TextPart(text=text)]


def _join_text(content: str | Sequence[TextContent] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _add_tools_to_system(
    turns: list[MessageTurn], tools: Sequence[Tool], system_prompt: str | None
) -> list[MessageTurn]:
    has_system_turn = turns[0][0] == "system"
    system_text = (
        "".join(p.text for p in turns[0][1] if isinstance(p, TextPart))
        if has_system_turn
        else system_prompt
    )
    return [
        ("system", [TextPart(text=format_system_prompt(system_text, tools))]),
        *turns[has_system_turn:],
    ]
