from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import Environment

from finesight.serve.api_schema import Tool, ToolCall
from finesight.serve.chat_response import ToolCallParser, parse_tool_call
from finesight.serve.worker_jobs import format_system_prompt, format_tool_calls, format_tool_result

BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Books a seat, größer <b>.",
        "parameters": {"type": "object", "properties": {"row": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "book", "arguments": {"row": 3}}\n</tool_call>'


def test_tool_prompt_matches_published_template(shared: Path):
    folder = shared / "qwen_assets" / "Qwen3-VL-Embedding-8B"
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    tools = [BOOK, {"type": "function", "function": {"name": "stop"}}]
    call = {"id": "1", "type": "function", "function": {"name": "book", "arguments": '{"row": 3}'}}
    expected = template.render(
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Book."},
            {"role": "assistant", "content": "Yes.", "tool_calls": [call, call]},
            {"role": "tool", "content": "done"},
            {"role": "tool", "content": "failed"},
        ],
        tools=tools,
    )
    turns = [
        (
            "system",
            format_system_prompt("Be short.", [Tool.model_validate(tool) for tool in tools]),
        ),
        ("user", "Book."),
        ("assistant", "Yes.\n" + format_tool_calls([ToolCall.model_validate(call)] * 2)),
        ("user", f"{format_tool_result('done')}\n{format_tool_result('failed')}"),
    ]
    ours = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert expected.startswith(ours)


def test_tool_prompt_without_system_prompt():
    assert format_system_prompt(None, [Tool.model_validate(BOOK)]).startswith("# Tools")
    assert format_system_prompt("", [Tool.model_validate(BOOK)]).startswith("\n\n# Tools")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("No call.", "No call.", []),
        (CALL, "", ["book"]),
        (f"Yes.\n{CALL}\n{CALL}", "Yes.", ["book", "book"]),
        (f"{CALL}\nDone.", "Done.", ["book"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["book"]),
        ("a < b <tool_c", "a < b <tool_c", []),
        ("a\n\n", "a\n\n", []),
        ("<tool_call>no JSON</tool_call>!", "<tool_call>no JSON</tool_call>!", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ("<tool_call>{", "<tool_call>{", []),
    ],
)
def test_tool_calls_are_parsed_from_any_chunking(text, shown, names, step):
    splitter, output, calls = ToolCallParser(), "", []
    for location in range(0, len(text), step):
        more, found = splitter.add_text(text[location : location + step])
        output, calls = output + more, calls + found
    more, found = splitter.flush()
    output, calls = output + more, calls + found
    assert output == shown
    assert [call.name for call in calls] == names
    assert all(json.loads(call.arguments) == {"row": 3} for call in calls)
    assert len({call.id for call in calls}) == len(calls)


def test_invalid_tool_calls():
    for text in ("", "[]", "null", '{"arguments": {}}', "[" * 100_000, '{"name": null}'):
        assert parse_tool_call(text) is None
    call = parse_tool_call('{"name": "a"}')
    assert call is not None
    assert call.arguments == "{}"
