"""Tool definitions and tool calls in the format of the Qwen3-VL chat template.

Tool definitions are JSON within `<tools>` in the system turn. Calls are JSON within `<tool_call>`
in an assistant turn. Results are within `<tool_response>` in the next user turn.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finesight.serve.chat_schema import Tool, ToolCall

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


@dataclass(frozen=True, slots=True)
class ParsedToolCall:
    """Tool call that the model has generated.

    Attributes:
        id: Generated ID of the call.
        name: Name of the function.
        arguments: Arguments as JSON text.
    """

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """Return the tool call object of the OpenAI API."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def format_system_prompt(system_prompt: str | None, tools: Sequence[Tool]) -> str:
    """Append the tool definitions to a system prompt, as in the chat template."""
    lines = [
        "\n" + json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools
    ]
    return (
        (f"{system_prompt}\n\n" if system_prompt is not None else "")
        + _TOOLS_PREFIX
        + "".join(lines)
        + _TOOLS_SUFFIX
    )


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


@dataclass(slots=True)
class ToolCallParser:
    """Splits a streamed completion into text and tool calls.

    Text that may start a tool call is held back until it is complete.
    """

    pending: str = ""
    after_call: bool = False

    def add_text(self, delta: str) -> tuple[str, list[ParsedToolCall]]:
        """Add generated text. Returns text that can be sent, and complete tool calls."""
        self._set_pending(self.pending + delta)
        text, calls = "", list[ParsedToolCall]()
        while TOOL_CALL_START in self.pending:
            before, _, rest = self.pending.partition(TOOL_CALL_START)
            call_text, end_tag, after = rest.partition(TOOL_CALL_END)
            if not end_tag:
                text, self.pending = text + before.rstrip("\n"), self.pending[len(before) :]
                return text, calls
            call = parse_tool_call(call_text)
            # Text that is not a valid call remains in the answer.
            text += (
                before.rstrip("\n")
                if call
                else f"{before}{TOOL_CALL_START}{call_text}{TOOL_CALL_END}"
            )
            calls += [call] if call else []
            self.after_call = call is not None
            self._set_pending(after)
        num_held_back = _count_partial_tag(self.pending)
        text, self.pending = (
            text + self.pending[: len(self.pending) - num_held_back],
            self.pending[-num_held_back:] * bool(num_held_back),
        )
        return text, calls

    def flush(self) -> tuple[str, list[ParsedToolCall]]:
        """Return the text or tool call that is left at the end of the completion.

        The last tool call may lack its end tag.
        """
        rest, self.pending = self.pending, ""
        call = (
            parse_tool_call(rest.removeprefix(TOOL_CALL_START))
            if rest.startswith(TOOL_CALL_START)
            else None
        )
        return ("", [call]) if call else (rest, [])

    def _set_pending(self, text: str) -> None:
        """Set the text that is held back, without newlines after a tool call."""
        self.pending = text.lstrip("\n") if self.after_call else text
        self.after_call = self.after_call and not self.pending


def parse_tool_call(text: str) -> ParsedToolCall | None:
    """Parse the text between the tool call tags, or return None if it is invalid."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    arguments_text = (
        arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
    return ParsedToolCall(f"call_{secrets.token_hex(12)}", value["name"], arguments_text)


def _count_partial_tag(text: str) -> int:
    """Count the last characters of a text that may belong to a tool call.

    These are newlines and a partial start tag.
    """
    for length in range(min(len(TOOL_CALL_START) - 1, len(text)), 0, -1):
        if TOOL_CALL_START.startswith(text[-length:]):
            rest = text[:-length]
            return length + len(rest) - len(rest.rstrip("\n"))
    return len(text) - len(text.rstrip("\n"))
