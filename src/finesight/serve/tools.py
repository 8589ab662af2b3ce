"""Tools as the chat template of Qwen3-VL lays them out, and calls read from answers.

The functions stand as JSON between `<tools>` in the system turn, a call as JSON between
`<tool_call>` in an answer, its result between `<tool_response>` in the next turn of the user.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finesight.serve.schema import Tool, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# Word for word what the models were taught with.
_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments"
    " within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants called, its arguments as JSON."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """The call as OpenAI's interface has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def system_text(system: str | None, tools: Sequence[Tool]) -> str:
    """The system turn's text, the tools after what it says by itself."""
    lines = [
        "\n" + json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools
    ]
    return (f"{system}\n\n" if system is not None else "") + _BEFORE + "".join(lines) + _AFTER


def called_text(calls: Sequence[ToolCall]) -> str:
    """Calls of an earlier answer as the model wrote them."""
    return "\n".join(
        f'{OPEN}\n{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}\n'
        f"{CLOSE}"
        for call in calls
    )


def result_text(content: str) -> str:
    """What a tool gave back."""
    return f"<tool_response>\n{content}\n</tool_response>"


@dataclass(slots=True)
class Splitter:
    """Parts an answer, as it grows, into text and calls; what may become a call is held back."""

    held: str = ""
    after_call: bool = False

    def take(self, text: str) -> tuple[str, list[Call]]:
        """What is certain by now: text to show, and calls that are whole."""
        self._hold(self.held + text)
        shown, calls = "", list[Call]()
        while OPEN in self.held:
            before, _, rest = self.held.partition(OPEN)
            inside, closed, after = rest.partition(CLOSE)
            if not closed:
                shown, self.held = shown + before.rstrip("\n"), self.held[len(before) :]
                return shown, calls
            call = read_call(inside)
            # Not JSON, or no call: the answer is shown as it is.
            shown += before.rstrip("\n") if call else f"{before}{OPEN}{inside}{CLOSE}"
            calls += [call] if call else []
            self.after_call = call is not None
            self._hold(after)
        keep = _unsure(self.held)
        shown, self.held = (
            shown + self.held[: len(self.held) - keep],
            self.held[-keep:] * bool(keep),
        )
        return shown, calls

    def end(self) -> tuple[str, list[Call]]:
        """What is left when the answer has ended: a last call may lack its closing mark."""
        rest, self.held = self.held, ""
        call = read_call(rest.removeprefix(OPEN)) if rest.startswith(OPEN) else None
        return ("", [call]) if call else (rest, [])

    def _hold(self, text: str) -> None:
        """Newlines after a call belong to it."""
        self.held = text.lstrip("\n") if self.after_call else text
        self.after_call = self.after_call and not self.held


def read_call(text: str) -> Call | None:
    """The call that stands between the marks; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(12)}", value["name"], written)


def _unsure(text: str) -> int:
    """How many characters at the end may belong to a call: newlines, and a mark's beginning."""
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if OPEN.startswith(text[-length:]):
            rest = text[:-length]
            return length + len(rest) - len(rest.rstrip("\n"))
    return len(text) - len(text.rstrip("\n"))
