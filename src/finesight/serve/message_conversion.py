"""Convert the messages of a chat completion request to a sample.

Tools follow the Qwen3-VL chat template: definitions are JSON within `<tools>` in the system turn,
calls are JSON within `<tool_call>` in an assistant turn, and results are within `<tool_response>`
in the next user turn.
"""

from __future__ import annotations

import itertools
import json
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
    ToolCall,
    ToolMessage,
    UserMessage,
)

MessageTurn = tuple[str, list[ContentPart]]

TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"

# The exact text of the chat template.
_TOOLS_PREFIX = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_SUFFIX = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments"
    " within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


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
    become one turn, and tool results become user turns. The system prompt of the model is used
    with tools if the request has none.

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
    if chat_request.tools and chat_request.tool_choice != "none":
        if turns[0][0] == "system":
            parts = turns.pop(0)[1]
            system_prompt = "".join(part.text for part in parts if isinstance(part, TextPart))
        text = format_system_prompt(system_prompt, chat_request.tools)
        turns.insert(0, ("system", [TextPart(text=text)]))
    messages = [
        Message.model_validate({"role": role, "content": tuple(parts)}) for role, parts in turns
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


def format_system_prompt(system_prompt: str | None, tools: Sequence[Tool]) -> str:
    """Append the tool definitions to a system prompt, as in the chat template."""
    lines = "".join(
        "\n" + json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools
    )
    prefix = "" if system_prompt is None else f"{system_prompt}\n\n"
    return f"{prefix}{_TOOLS_PREFIX}{lines}{_TOOLS_SUFFIX}"


def format_tool_calls(calls: Sequence[ToolCall]) -> str:
    """Format the tool calls of an earlier assistant message as text of the chat template."""
    return "\n".join(
        f'{TOOL_CALL_START}\n{{"name": "{call.function.name}",'
        f' "arguments": {call.function.arguments}}}\n{TOOL_CALL_END}'
        for call in calls
    )


def format_tool_result(content: str) -> str:
    """Format the result of a tool call as text of the chat template."""
    return f"<tool_response>\n{content}\n</tool_response>"


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
    content = message.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    if isinstance(message, ToolMessage):
        return "user", [TextPart(text=format_tool_result(text))]
    if isinstance(message, AssistantMessage):
        calls = format_tool_calls(message.tool_calls or [])
        both = f"{text}\n{calls}" if text and calls else text or calls
        return "assistant", [TextPart(text=both)]
    return "system", [TextPart(text=text)]
