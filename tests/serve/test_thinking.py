"""Thinking mode of requests: reasoning and answer are separate fields."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import RunningServer, run_server
from openai import BadRequestError, OpenAI
from tiny_task import ANSWER, THOUGHT

from finesight.infer.inference_service import IncrementalDetokenizer
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


@pytest.mark.parametrize(
    ("given", "thinks"),
    [
        ({}, True),
        (enable(True), True),
        ({"reasoning_effort": "xhigh"}, True),
        (enable(False), False),
        ({"reasoning_effort": "none"}, False),
    ],
)
def test_reasoning_is_separated_from_answer(
    thinking_client: OpenAI, given: dict[str, Any], thinks: bool
) -> None:
    message = ask(thinking_client, **given).choices[0].message
    assert message.content == ANSWER
    assert message.model_extra.get("reasoning_content") == (THOUGHT if thinks else None)
    assert "think" not in message.raw_text


@pytest.fixture
def slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model wait at each token, because deltas that arrive together are merged."""
    add_token = IncrementalDetokenizer.add_token

    def wait_and_add_token(detokenizer: IncrementalDetokenizer, token_id: int) -> str:
        time.sleep(0.03)
        return add_token(detokenizer, token_id)

    monkeypatch.setattr(IncrementalDetokenizer, "add_token", wait_and_add_token)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.usefixtures("slow_model")
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
@pytest.mark.parametrize("thinks", [True, False])
def test_schema_applies_to_answer_after_reasoning(
    thinking_client: OpenAI, stream: bool, thinks: bool
) -> None:
    schema = {"type": "json_schema", "json_schema": COLORS}
    found = ask(thinking_client, response_format=schema, stream=stream, **enable(thinks))
    pieces = [c.choices[0].delta for c in found] if stream else [found.choices[0].message]
    assert json.loads("".join(one.content or "" for one in pieces)) in ("red", "blue")
    reasoning = "".join(one.model_extra.get("reasoning_content", "") for one in pieces)
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


def test_earlier_reasoning_is_sent_back(thinking_client: OpenAI) -> None:
    """The template of Qwen3.5 omits the reasoning of earlier turns, but it separates it."""
    first = ask(thinking_client).choices[0].message.model_dump()
    inline = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    answers = [first, *({"role": "assistant", "content": text} for text in (inline, ANSWER))]
    counts = {
        ask(thinking_client, [*QUESTION, answer, *QUESTION]).usage.prompt_tokens
        for answer in answers
    }
    assert len(counts) == 1
