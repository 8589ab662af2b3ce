from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError
from pydantic import BaseModel, Field
from serving import QUESTION, asked, data_url, image, png

from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.infer.predict import predict


def test_models(client, server):
    names = [model.id for model in client.models.list()]
    assert names == list(server.service.names)
    assert client.models.retrieve(names[0]).id == names[0]
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")


def test_the_answer_is_that_of_predict(plain, client, answerer, scenes):
    parts = (ImagePart(image=scenes[0].name), TextPart(text=QUESTION))
    messages = (Message(role="user", content=parts),)
    sample = Located(Sample(id="a", messages=messages), scenes[0].parent)
    (expected,) = predict(answerer.model, answerer.renderer, [sample], max_new_tokens=30, batch=1)
    found = plain(client)
    (choice,) = found.choices
    assert choice.message.content == expected.answer
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if expected.stopped else "length")
    assert found.usage.completion_tokens == expected.tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + expected.tokens
    extra = choice.message.model_extra
    assert extra["raw"] == expected.raw
    assert extra["boxes"] == expected.as_json()["boxes"]


def test_a_stream_says_the_same_with_usage(plain, client, server):
    whole = plain(client)
    chunks = list(plain(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == whole.choices[0].finish_reason
    assert set(ends[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(plain(client, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_several_choices_and_seeds(plain, client, server):
    given = {"n": 3, "temperature": 8.0, "seed": 7, "max_tokens": 8}
    first, again = plain(client, **given), plain(client, **given)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in plain(client, **given, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    alone = plain(client, **{**given, "n": 1, "seed": 8})
    assert alone.choices[0].message.content == texts[1]


def test_logprobs(plain, client, server):
    found = plain(client, logprobs=True, top_logprobs=3, max_tokens=6)
    rows = found.choices[0].logprobs.content
    assert len(rows) == found.usage.completion_tokens
    for row in rows:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        # Greedy: the token is the most probable one.
        assert row.token == row.top_logprobs[0].token
        assert row.logprob == pytest.approx(row.top_logprobs[0].logprob)
    said = b"".join(bytes(row.bytes) for row in rows).decode()
    assert said.startswith(found.choices[0].message.content)
    chunks = list(plain(client, logprobs=True, max_tokens=6, stream=True))
    streamed = [row for c in chunks for x in c.choices if x.logprobs for row in x.logprobs.content]
    assert [row.token for row in streamed] == [row.token for row in rows]
    assert all(row.top_logprobs == [] for row in streamed)


def test_stop(plain, client, server):
    whole = plain(client).choices[0].message.content
    assert len(whole) > 6, "the answer is too short to stop within"
    stop = whole[4:6]
    found = plain(client, stop=[stop, "never said"]).choices[0]
    assert found.message.content == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(plain, client, server, stream):
    schema = {
        "type": "object",
        "properties": {
            "row": {"type": "integer", "minimum": 1, "maximum": 9},
            "kind": {"enum": ["a", "b"]},
        },
        "required": ["row", "kind"],
        "additionalProperties": False,
    }
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "ticket", "strict": True, "schema": schema},
    }
    found = plain(client, response_format=shape, max_tokens=60, stream=stream)
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in found)
    else:
        text = found.choices[0].message.content
    value = json.loads(text)
    assert set(value) == {"row", "kind"}
    assert 1 <= value["row"] <= 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_becomes_too_large_is_told(plain, client, stream):
    properties = {f"p{number}": {"type": "string"} for number in range(3000)}
    schema = {"type": "object", "properties": properties}
    shape = {"type": "json_schema", "json_schema": {"name": "many", "schema": schema}}
    with pytest.raises(APIError, match="too large to follow"):
        list(plain(client, response_format=shape, stream=stream))


class Ticket(BaseModel):
    row: int = Field(ge=1, le=9)
    kind: Literal["a", "b"]


def test_answers_as_objects_of_python(client, server):
    found = client.chat.completions.parse(
        model=server.service.names[0],
        messages=asked("Book a seat."),
        response_format=Ticket,
        max_tokens=120,
        seed=1,
        temperature=1.0,
        stop=None,
    )
    assert isinstance(found.choices[0].message.parsed, Ticket)


def test_the_client_that_does_not_wait(server):
    async def both() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            given = {"model": server.service.names[0], "messages": asked("Who?"), "max_tokens": 5}
            whole = await client.chat.completions.create(**given)
            stream = await client.chat.completions.create(**given, stream=True)
            said = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [whole.choices[0].message.content, "".join(said)]

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_a_json_object(plain, client, server):
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "none", "schema": schema}}
    assert json.loads(plain(client, response_format=shape).choices[0].message.content) == {}
    begun = plain(client, response_format={"type": "json_object"}, max_tokens=5)
    assert begun.choices[0].message.content.startswith("{")


def test_boxes(plain, client, scenes):
    messages = asked(image(data_url(scenes[3].read_bytes())), "Locate each hollow gray hexagon.")
    free = plain(client, messages=messages, max_tokens=60).choices[0].message
    # OpenAI's client knows no such format; it takes it as an extra of the body.
    shape = {"response_format": {"type": "boxes"}}
    held = plain(client, messages=messages, max_tokens=60, extra_body=shape).choices[0].message
    assert held.model_extra == free.model_extra
    (box,) = held.model_extra["boxes"]
    assert box["label"] == "hollow gray hexagon"
    # What was drawn: 80, 88, 108, 120.
    assert box["xyxy"] == pytest.approx([80, 88, 108, 120], abs=8)
    assert "<|box_start|>" in held.model_extra["raw"]
    caption = plain(client, extra_body=shape).choices[0].message
    assert caption.model_extra["raw"].startswith(
        ("<|box_start|>", "<|object_ref_start|>", "<|im_e")
    )


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {"row": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["row"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_call_is_made_and_its_result_is_taken(plain, client, server, choice):
    found = plain(client, tools=TOOLS, tool_choice=choice, max_tokens=80).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert call.type == "function"
    assert call.function.name in ({"book"} if choice != "required" else {"book", "stop"})
    assert isinstance(json.loads(call.function.arguments), dict)
    chunks = list(plain(client, tools=TOOLS, tool_choice=choice, max_tokens=80, stream=True))
    streamed = [c for k in chunks for x in k.choices for c in x.delta.tool_calls or []]
    assert [c.function.name for c in streamed] == [call.function.name]
    assert streamed[0].index == 0
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    messages = [
        *asked("Book a seat."),
        found.message,
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    answered = plain(client, messages=messages, tools=TOOLS, max_tokens=4)
    assert answered.usage.completion_tokens >= 1


def test_conversations_with_a_system_prompt(plain, client, server):
    first = asked("Who are you?")
    said = plain(client, messages=first, max_tokens=6).choices[0].message
    more = [{"role": "system", "content": "Be short."}, *first, said, *asked("And now?")]
    found = plain(client, messages=more, max_tokens=6)
    assert found.usage.prompt_tokens > 20
    joined = plain(client, messages=[*asked("Who are"), *asked("you?")], max_tokens=1)
    assert joined.usage.prompt_tokens > 5


def test_a_picture_that_was_seen_is_known(plain, client, server):
    messages = asked(image(data_url(png(168, 168, seed=99))), "What does the picture show, please?")
    plain(client, messages=messages, max_tokens=1)
    again = plain(client, messages=messages, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens <= again.usage.prompt_tokens


def test_uploaded_files(plain, client, server, scenes):
    picture = scenes[0].read_bytes()
    kept = client.files.create(file=("../../evil.png", picture), purpose="vision")
    assert kept.filename == "../../evil.png"
    assert kept.bytes == len(picture)
    # The name is no path: what is kept lies in the server's own folder, under its own name.
    inside = [path.name for path in (server.folder / "files").iterdir()]
    assert kept.id in inside
    assert not any("evil" in path.name for path in server.folder.parent.rglob("*"))
    assert kept.id in [file.id for file in client.files.list()]
    assert client.files.retrieve(kept.id).bytes == len(picture)
    part = {"type": "file", "file": {"file_id": kept.id}}
    found = plain(client, messages=asked(part, QUESTION))
    assert found.choices[0].message.content == plain(client).choices[0].message.content
    assert client.files.delete(kept.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(kept.id)
    with pytest.raises(NotFoundError) as raised:
        plain(client, messages=asked(part, QUESTION))
    assert raised.value.body["param"] == "messages.0.content.0"
    with pytest.raises(BadRequestError, match="not a picture"):
        client.files.create(file=("a.png", b"no picture"), purpose="vision")
    with pytest.raises(BadRequestError, match="purpose"):
        client.files.create(file=("a.png", picture), purpose="batch")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": -1}, None),
        ({"top_p": 0}, None),
        ({"n": 9}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 20}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"top_k": -1}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "strange"}}}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [*asked("a"), {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": asked("a" * 1_000_001)}, "messages"),
        ({"messages": asked("word " * 190_000)}, "messages"),
        ({"messages": asked(*[image("data:,")] * 33)}, "messages"),
    ],
)  # fmt: skip
def test_what_is_refused(plain, client, server, given, param):
    with pytest.raises(BadRequestError) as raised:
        plain(client, **given)
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert (body["param"] or "").split(".")[0] == (param or "")
    assert body["message"]


def test_an_unknown_model(plain, client, server):
    with pytest.raises(NotFoundError) as raised:
        plain(client, model="other")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("empty", [None, ""])
def test_an_answer_of_nothing_may_be_sent_back(plain, client, empty):
    """As clients do with what the server itself answers when the first token ends it."""
    messages = [*asked("a"), {"role": "assistant", "content": empty}, *asked("b")]
    found = plain(client, messages=messages, max_tokens=4)
    both = plain(client, messages=[*asked("a"), *asked("b")], max_tokens=4)
    assert found.choices[0].message.content == both.choices[0].message.content
