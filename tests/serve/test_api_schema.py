"""Tests of requests: schema against the types of the openai package, limits, and tool calls."""

import json
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter

from finesight.samples.sample import ToolCallPart, parse_tool_call, sample_from_dict
from finesight.serve.api_schema import (
    IGNORED_FIELDS,
    ApiError,
    ChatCompletionRequest,
    NeutralParameters,
    ServerLimits,
    parse_chat_request,
)
from finesight.serve.chat_completions import ToolCallParser
from finesight.serve.preprocessing_jobs import MediaFolder, build_sample

OPENAI_PARAMETERS = {
    *("frequency_penalty", "presence_penalty", "logit_bias", "modalities", "verbosity"),
    "function_call",
}
EXTENSIONS = {
    "top_k",
    "repetition_penalty",
    "skip_special_tokens",
    *(NeutralParameters.model_fields.keys() - OPENAI_PARAMETERS),
    *("chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs"),
    "messages.[].reasoning_content",
    # A tool result may contain images.
    *("messages.[].role: tool", "messages.[].tool_call_id"),
    "reasoning_effort: any",
    *("response_format.type: boxes", "response_format.type: points"),
    "messages.[].content.[].image_url.detail: any",
    # The type for streams allows true only.
    "stream: any",
}
UNSUPPORTED = {"audio", "functions", "moderation", "web_search_options"}

Schema = dict[str, Any]


def get_alternatives(schema: Schema, root: Schema) -> list[Schema]:
    """Resolve references and unions of a JSON schema."""
    if "$ref" in schema:
        return get_alternatives(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "allOf" in schema:
        return get_alternatives(schema["allOf"][0], root)
    members = schema.get("anyOf") or schema.get("oneOf")
    if members is not None:
        return [found for member in members for found in get_alternatives(member, root)]
    for name in {"role", "type"} & schema.get("properties", {}).keys():
        tag = schema["properties"][name]
        if "enum" in tag:
            return [
                schema | {"properties": schema["properties"] | {name: tag | {"enum": [value]}}}
                for value in tag["enum"]
            ]
    return [schema]


class SchemaComparison:
    """Lists the JSON values that one schema accepts and another one rejects, by field path."""

    def __init__(self, ours: Schema, theirs: Schema) -> None:
        self.ours, self.theirs = ours, theirs

    def compare(self, ours: Schema, theirs: Schema, path: str = "") -> set[str]:
        """Return the field paths in `ours` that `theirs` does not accept."""
        accepted = get_alternatives(theirs, self.theirs)
        problems: set[str] = set()
        for one in get_alternatives(ours, self.ours):
            if one.get("type") != "null":
                same = [a for a in accepted if a.get("type") == one.get("type")] or accepted
                problems |= min((self.compare_one(one, a, path) for a in same), key=len)
        return problems

    def compare_one(self, ours: Schema, theirs: Schema, path: str) -> set[str]:
        """Compare two schemas without unions."""
        kind, other_kind = ours.get("type"), theirs.get("type")
        if kind is None or other_kind is None:  # any value
            return set()
        if kind == "object" and other_kind == "object":
            prefix = f"{path}." if path else ""
            fields, known = ours.get("properties", {}), theirs.get("properties", {})
            problems = {f"{prefix}{name}" for name in fields if known and name not in known}
            for name in fields.keys() & known.keys():
                problems |= self.compare(fields[name], known[name], f"{prefix}{name}")
            return problems
        if kind == "array" and other_kind == "array":
            return self.compare(ours.get("items", {}), theirs.get("items", {}), f"{path}.[]")
        if kind != other_kind and (kind, other_kind) != ("integer", "number"):
            return {f"{path}: {kind}"}
        values = ours.get("enum", [ours["const"]] if "const" in ours else None)
        known_values = theirs.get("enum", [theirs["const"]] if "const" in theirs else None)
        if known_values is None:
            return set()
        return {f"{path}: {value}" for value in values or ["any"] if value not in known_values}


def test_schema_is_a_subset_of_the_openai_types():
    ours = ChatCompletionRequest.model_json_schema()
    # Videos are an extension.
    ours["$defs"] |= dict.fromkeys(
        ("VideoContent", "VideoURLContent"), ours["$defs"]["TextContent"]
    )
    theirs = TypeAdapter(CompletionCreateParamsStreaming).json_schema()
    problems = SchemaComparison(ours, theirs).compare(ours, theirs)
    assert problems == EXTENSIONS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": "data:,"}], "0.image_url.image_url: Input should be"),
        ([{"type": "text", "text": "a", "b": 1}], "0.text.b: unknown field"),
        (5, "str: Input should be a valid string"),
    ],
)
def test_error_names_the_wrong_part_of_a_message(content, message):
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    with pytest.raises(ApiError) as raised:
        parse_chat_request(json.dumps(body).encode())
    assert f"messages.0.user.content.{message}" in str(raised.value)


def test_every_openai_field_is_supported_or_known():
    theirs = set(TypeAdapter(CompletionCreateParamsStreaming).json_schema()["properties"])
    ours = {*ChatCompletionRequest.model_fields, *IGNORED_FIELDS}
    assert theirs - ours == UNSUPPORTED
    assert set(IGNORED_FIELDS[:-4]) <= theirs


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_unknown_fields_without_a_value_are_ignored(value):
    text = {"type": "text", "text": "a", "cache_control": value}
    tool = {"type": "function", "function": {"name": "f", "deferred": value}}
    body = {"model": "m", "messages": [{"role": "user", "content": [text], "refusal": value}]}
    body |= {"tools": [tool], "stream_options": {"extra": value}, "documents": value}
    found = parse_chat_request(json.dumps(body | {"priority": 3, "user": "u"}).encode())
    assert found.parameters.keys() == {"model", "tools", "stream_options"}


@pytest.mark.parametrize("value", [False, 0, "a", [None], {"a": None}])
def test_unknown_fields_with_a_value_are_rejected(value):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "enable_thinking": value}
    with pytest.raises(ApiError, match="enable_thinking: unknown field"):
        parse_chat_request(json.dumps(body).encode())


BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Books a seat, größer <b>.",
        "parameters": {"type": "object", "properties": {"row": {"type": "integer"}}},
    },
}
XML_CALL = (
    "<tool_call>\n<function=book>\n<parameter=row>\n3\n</parameter>\n</function>\n</tool_call>"
)
CALL = '<tool_call>\n{"name": "book", "arguments": {"row": 3}}\n</tool_call>'


def test_tools_of_a_request_are_those_of_a_sample(tmp_path):
    media = MediaFolder(tmp_path, ServerLimits())
    call = {"id": "1", "type": "function", "function": {"name": "book", "arguments": '{"row": 3}'}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Book."},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call, call]},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": [{"type": "text", "text": "failed"}]},
    ]
    request = {"model": "m", "messages": messages, "tools": [BOOK]}
    sample = build_sample(ChatCompletionRequest.model_validate(request), media)
    part = {"type": "tool_call", "name": "book", "arguments": {"row": 3}}
    contents = ["Be short.", "Book.", [{"type": "text", "text": "Yes."}, part, part]]
    roles = ("system", "user", "assistant", "tool", "tool")
    turns = zip(roles, [*contents, "done", "failed"], strict=True)
    expected = {"tools": [BOOK], "messages": [{"role": r, "content": c} for r, c in turns]}
    assert sample == sample_from_dict({"id": "request", **expected}, "")
    call["function"]["arguments"] = "[1]"
    with pytest.raises(ApiError, match="JSON object"):
        build_sample(ChatCompletionRequest.model_validate(request), media)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("No call.", "No call.", []),
        (CALL, "", ["book"]),
        (f"Yes.\n{CALL}\n{CALL}", "Yes.", ["book", "book"]),
        (f"{CALL}\nDone.", "Done.", ["book"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["book"]),
        (XML_CALL, "", ["book"]),
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
    assert calls == [ToolCallPart(name=n, arguments={"row": 3}) for n in names]


def test_invalid_tool_calls():
    for text in ("", "[]", "null", '{"arguments": {}}', "[" * 100_000, '{"name": null}'):
        assert parse_tool_call(text) is None
    assert parse_tool_call('{"name": "a"}') == ToolCallPart(name="a")
    call = "<function=book>\n<parameter=row>\n3\n</parameter>\n</function>"
    for kind, value in (("integer", 3), ("string", "3")):
        schema = {"properties": {"row": {"type": kind}}}
        tools = [{"function": {"name": "book", "parameters": schema}}]
        assert parse_tool_call(call, tools) == ToolCallPart(name="book", arguments={"row": value})
