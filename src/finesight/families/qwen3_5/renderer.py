"""Model families Qwen3.5, Qwen3.6 and Qwen3.8: boxes and videos of Qwen3-VL, reasoning by turn.

The prompt of an answer without reasoning ends with an empty reasoning section, the non-thinking
mode of the published templates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from finesight.encode.family import (
    THINK_END,
    THINK_START,
    format_definitions,
    is_question,
    strip_content,
)
from finesight.families.qwen3_vl.renderer import Qwen3VL
from finesight.model_folder import ModelFolder
from finesight.samples.sample import (
    TOOL_CALL_END,
    TOOL_CALL_START,
    ContentPart,
    Message,
    TextPart,
    ToolCallPart,
)

EFFORT_INSTRUCTIONS: dict[str, str] = {
    "xhigh": (
        "Reasoning effort is set to xhigh. Please think carefully through the task, validate key "
        "assumptions, consider plausible alternatives, and prioritize correctness, consistency, "
        "and clarity in the final answer."
    ),
    "medium": "",
    "low": (
        "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to "
        "the conclusion without unnecessary elaboration."
    ),
}
"""Start of the system prompt of Qwen3.8 by reasoning effort."""


_TOOLS_PREFIX = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
_TOOLS_SUFFIX = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must \
be nested within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the \
function call, but NOT after
- If there is no function call available, answer the question like normal with your current \
knowledge and do not tell the user about function calls
</IMPORTANT>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35(Qwen3VL):
    """Prompt format of Qwen3.5 models, dense or MoE.

    Attributes:
        preserves_reasoning: Render the reasoning of turns before the last question.
        writes_json_scalars: Write boolean and null arguments of tool calls as JSON, not as Python.
    """

    name: str = "qwen3_5"
    preserves_reasoning: bool = False
    writes_json_scalars: bool = True
    calls_are_xml: ClassVar[bool] = True
    call_separator: ClassVar[str] = "\n\n"
    has_thinking_modes: ClassVar[bool] = True
    strips_content: ClassVar[bool] = True

    @property
    def reasoning_efforts(self) -> tuple[str, ...]:
        if self.reasoning_effort is None:
            return ()
        return tuple(EFFORT_INSTRUCTIONS)

    @property
    def renders_reasoning(self) -> bool:
        return True

    @property
    def supervises_empty_reasoning(self) -> bool:
        return False

    @property
    def generation_prompt(self) -> str:
        return THINK_START if self.has_reasoning else THINK_START + THINK_END

    def keeps_reasoning(
        self, messages: Sequence[Message], index: int, *, has_reasoning: bool
    ) -> bool:
        """Return True after the last question, or for all turns of a family that keeps them."""
        return self.preserves_reasoning or not any(map(is_question, messages[index:]))

    def write_tools(
        self, tools: Sequence[dict[str, Any]], system: Sequence[ContentPart]
    ) -> Sequence[ContentPart]:
        """Return the definitions of tools, followed by the content of the system turn."""
        text = f"{_TOOLS_PREFIX}{format_definitions(tools)}{_TOOLS_SUFFIX}"
        content = strip_content(system)
        if not content:
            return (TextPart(text=text),)
        return TextPart(text=text), TextPart(text="\n\n"), *content

    def write_tool_call(self, call: ToolCallPart) -> str:
        """Return the text of a tool call in XML, with its tags."""
        lines = [TOOL_CALL_START, f"<function={call.name}>"]
        for name, value in call.arguments.items():
            lines += [f"<parameter={name}>", self._write_argument(value), "</parameter>"]
        return "\n".join((*lines, "</function>", TOOL_CALL_END))

    def _write_argument(self, value: Any) -> str:
        is_container = isinstance(value, list | dict)
        if not isinstance(value, str) and (self.writes_json_scalars or is_container):
            return json.dumps(value, ensure_ascii=False)
        return str(value)

    def format_messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Strip whitespace around contents, and add the reasoning effort to the system prompt."""
        stripped = [
            message.model_copy(update={"content": strip_content(message.content)})
            for message in messages
        ]
        if self.reasoning_effort is None:
            return stripped
        instructions = ""
        if self.has_reasoning:
            instructions = EFFORT_INSTRUCTIONS[self.reasoning_effort]
        system_content: tuple[ContentPart, ...] = ()
        others = stripped
        if stripped[0].role == "system":
            system_content = stripped[0].content
            others = stripped[1:]
        if instructions:
            separator = "\n\n" if system_content else ""
            system_content = (TextPart(text=instructions + separator), *system_content)
        if not system_content:
            return others
        return [Message.model_construct(role="system", content=system_content), *others]


def from_folder(folder: ModelFolder) -> Qwen35:
    """Create the family in non-thinking mode, with the reasoning rules of the chat template."""
    template = folder.chat_template
    return Qwen35(
        name=folder.family,
        preserves_reasoning="preserve_thinking is undefined" in template,
        reasoning_effort="xhigh" if "reasoning_effort" in template else None,
        # The template expects reasoning and answer separately, and strips both.
        strips_answer="'</think>' in content" not in template,
        writes_json_scalars="if args_value is string else" in template,
    )
