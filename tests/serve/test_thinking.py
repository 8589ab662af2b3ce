"""Thinking mode of requests: reasoning and answer are separate fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import RunningServer, run_server
from openai import BadRequestError, OpenAI
from thinking_fixtures import ANSWER, THOUGHT

from finesight.infer.model_loader import load_inference_model

QUESTION = [{"role": "user", "content": "Which colour?"}]
COLORS = {"name": "color", "schema": {"enum": ["red", "blue"]}}


@pytest.fixture(scope="module")
def thinking_server(
    thinking_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    model = load_inference_model(str(thinking_run), "cpu", "fp32")
    with run_server(model, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def thinking_client(thinking_server: RunningServer) -> OpenAI:
    return thinking_server.client()


def ask(client: OpenAI, messages: Any = QUESTION, **given: Any) -> Any:
    extra = {name: given.pop(name) for name in ("chat_template_kwargs",) if name in given}
    return client.chat.completions.create(
        model="run-6", messages=messages, max_tokens=60, extra_body=extra, **given
    )


def enable(value: bool, **more: str) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": value, **more}}


@pytest.mark.parametrize("given", [{}, enable(True), {"reasoning_effort": "xhigh"}])
def test_reasoning_is_separated_from_answer(thinking_client: OpenAI, given: dict[str, Any]) -> None:
    message = ask(thinking_client, **given).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
    assert "think" not in message.raw_text


@pytest.mark.parametrize("given", [enable(False), {"reasoning_effort": "none"}])
def test_non_thinking_mode_has_no_reasoning(thinking_client: OpenAI, given: dict[str, Any]) -> None:
    message = ask(thinking_client, **given).choices[0].message
    assert message.content == ANSWER
    assert "reasoning_content" not in message.model_extra


@pytest.mark.parametrize("thinks", [True, False])
def test_stream_contains_reasoning_before_answer(thinking_client: OpenAI, thinks: bool) -> None:
    deltas = [
        chunk.choices[0].delta
        for chunk in ask(thinking_client, stream=True, stop=["plain", " is."], **enable(thinks))
    ]
    reasoning = [delta.model_extra.get("reasoning_content", "") for delta in deltas]
    contents = [delta.content or "" for delta in deltas]
    assert "".join(contents) == "Red it", "stop strings apply to the answer only"
    assert "".join(reasoning) == (THOUGHT if thinks else "")
    if thinks:
        assert len([text for text in reasoning if text]) > 2
        last = max(index for index, text in enumerate(reasoning) if text)
        assert not any(contents[:last])


@pytest.mark.parametrize("stream", [False, True])
def test_schema_applies_to_answer_after_reasoning(thinking_client: OpenAI, stream: bool) -> None:
    schema = {"type": "json_schema", "json_schema": COLORS}
    for thinks in (True, False):
        found = ask(thinking_client, response_format=schema, stream=stream, **enable(thinks))
        if stream:
            deltas = [chunk.choices[0].delta for chunk in found]
            content = "".join(delta.content or "" for delta in deltas)
            reasoning = "".join(delta.model_extra.get("reasoning_content", "") for delta in deltas)
        else:
            message = found.choices[0].message
            content, reasoning = message.content, message.model_extra.get("reasoning_content", "")
        assert json.loads(content) in ("red", "blue")
        assert reasoning == (THOUGHT if thinks else "")


def test_effort_changes_prompt(thinking_client: OpenAI) -> None:
    counts = {
        effort: ask(thinking_client, reasoning_effort=effort).usage.prompt_tokens
        for effort in ("xhigh", "medium", "low")
    }
    assert counts["xhigh"] > counts["low"] > counts["medium"]
    given = {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert ask(thinking_client, **given).usage.prompt_tokens == counts["low"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"reasoning_effort": "high"}, "xhigh, medium, low"),
        (enable(False, reasoning_effort="low"), "thinking mode"),
        ({"reasoning_effort": "low"} | enable(True, reasoning_effort="medium"), "one value"),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, "unknown field"),
    ],
)
def test_unknown_mode_is_rejected(
    thinking_client: OpenAI, given: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadRequestError, match=expected):
        ask(thinking_client, **given)


def test_model_without_thinking_rejects_the_mode(client: OpenAI) -> None:
    for given in ({"reasoning_effort": "low"}, {"extra_body": enable(True)}):
        with pytest.raises(BadRequestError, match="expected no"):
            client.chat.completions.create(
                model="finesight-tiny", messages=QUESTION, max_tokens=1, **given
            )


def test_earlier_reasoning_is_sent_back(thinking_server: RunningServer, tmp_path: Path) -> None:
    """The template of Qwen3.5 omits the reasoning of earlier turns, but it separates it."""
    client = thinking_server.client()
    first = ask(client).choices[0].message
    counts = [
        ask(client, [*QUESTION, answer, *QUESTION]).usage.prompt_tokens
        for answer in (
            first.model_dump(),
            {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
            {"role": "assistant", "content": ANSWER},
        )
    ]
    assert len(set(counts)) == 1
