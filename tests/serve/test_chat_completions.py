"""Chat completions against the OpenAI client and `predict`."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from api_server_fixtures import (
    PROMPT,
    RunningServer,
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    make_video_part,
    run_server,
    wait_until_idle,
)
from case_files import load_cases
from hostile_requests import make_schema_format
from lora_fixtures import TUNE_SETTINGS, randomize_parameters
from openai import BadRequestError, NotFoundError
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.export.deployment import REQUEST_PARAMETERS
from finesight.infer.model_loader import load_inference_model, load_multi_adapter_model
from finesight.infer.prediction import predict
from finesight.model.linear import iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import ImagePart, LocatedSample, Message, Sample, TextPart, VideoPart
from finesight.settings.config import TuneSettings


def make_object_schema(**properties: Any) -> dict[str, Any]:
    """Make the schema of an object with these properties only."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return schema | {"additionalProperties": False}


def test_list_models(ask_about_scene, client, server):
    names = [model.id for model in client.models.list()]
    assert names == list(server.service.model_names)
    assert client.models.retrieve(names[0]).id == names[0]
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(NotFoundError) as raised:
        ask_about_scene(client, model="other")
    assert raised.value.code == "model_not_found"


def test_answer_matches_predict(ask_about_scene, client, inference_model, scenes):
    parts = (ImagePart(image=scenes[0].name), TextPart(text=PROMPT))
    messages = (Message(role="user", content=parts),)
    sample = LocatedSample(Sample(id="a", messages=messages), scenes[0].parent)
    (expected,) = predict(
        inference_model.model, inference_model.renderer, [sample], max_new_tokens=30, batch_size=1
    )
    found = ask_about_scene(client)
    (choice,) = found.choices
    assert choice.message.content == expected.answer
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert found.usage.completion_tokens == expected.num_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + expected.num_tokens
    extra = choice.message.model_extra
    assert extra["raw_text"] == expected.raw_text
    assert extra["boxes"] == expected.as_json()["boxes"]


def test_answer_about_a_video_matches_predict(ask_about_scene, client, inference_model, tmp_path):
    clip = pytest.importorskip("video_fixtures").write_video(tmp_path / "clip.mp4", 40)
    parts = (VideoPart(video="clip.mp4", fps=1.0), TextPart(text=PROMPT))
    messages = (Message(role="user", content=parts),)
    sample = LocatedSample(Sample(id="a", messages=messages), tmp_path)
    (expected,) = predict(
        inference_model.model, inference_model.renderer, [sample], max_new_tokens=30, batch_size=1
    )
    part, sampling = make_video_part(clip.read_bytes()), {"mm_processor_kwargs": {"fps": 1}}
    given = {"messages": make_messages(part, PROMPT), "extra_body": sampling}
    found = ask_about_scene(client, **given)
    assert found.choices[0].message.content == expected.answer
    prompt = inference_model.renderer.tokenize_prompt(sample)
    assert found.usage.prompt_tokens == prompt.num_tokens
    assert join_stream(ask_about_scene(client, stream=True, **given)) == expected.answer


def join_stream(chunks: Any) -> str:
    """Return the text of the first choice of a stream."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_stream_matches_response_with_usage(ask_about_scene, client):
    full = ask_about_scene(client)
    chunks = list(ask_about_scene(client, stream=True, stream_options={"include_usage": True}))
    assert join_stream(chunks) == full.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == full.choices[0].finish_reason
    assert set(ends[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == full.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask_about_scene(client, stream=True))


def test_several_choices_and_seeds(ask_about_scene, client):
    given = {"n": 3, "temperature": 8.0, "seed": 7, "max_tokens": 8}
    first, again = ask_about_scene(client, **given), ask_about_scene(client, **given)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in ask_about_scene(client, **given, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    alone = ask_about_scene(client, **{**given, "n": 1, "seed": 8})
    assert alone.choices[0].message.content == texts[1]


def test_logprobs(ask_about_scene, client):
    found = ask_about_scene(client, logprobs=True, top_logprobs=3, max_tokens=6)
    logprobs = found.choices[0].logprobs.content
    assert len(logprobs) == found.usage.completion_tokens
    for entry in logprobs:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        # Greedy: the token is the most probable one.
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
    output = b"".join(bytes(entry.bytes) for entry in logprobs).decode()
    assert output.startswith(found.choices[0].message.content)
    chunks = list(ask_about_scene(client, logprobs=True, max_tokens=6, stream=True))
    streamed = [
        entry for c in chunks for x in c.choices if x.logprobs for entry in x.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in logprobs]
    assert all(entry.top_logprobs == [] for entry in streamed)


def test_stop_strings(ask_about_scene, client):
    full = ask_about_scene(client).choices[0].message.content
    assert len(full) > 6, "the answer is too short to stop within"
    stop = full[4:6]
    found = ask_about_scene(client, stop=[stop, "never said"]).choices[0]
    assert found.message.content == full[: full.index(stop)]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_response(ask_about_scene, client, stream):
    row = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = make_object_schema(row=row, kind={"enum": ["a", "b"]})
    shape = make_schema_format(schema)
    found = ask_about_scene(client, response_format=shape, max_tokens=60, stream=stream)
    value = json.loads(join_stream(found) if stream else found.choices[0].message.content)
    assert set(value) == {"row", "kind"}
    assert 1 <= value["row"] <= 9


@pytest.fixture
def locate(ask_about_scene, client, scenes):
    """Ask for the box of the fourth scene."""
    image = make_image_part(make_data_url(scenes[3].read_bytes()))
    messages = make_messages(image, "Locate each hollow gray hexagon.")
    return partial(ask_about_scene, client, messages=messages, max_tokens=60)


def test_box_response(locate, ask_about_scene, client):
    free = locate().choices[0].message
    # The client passes unknown formats as extra fields.
    shape = {"response_format": {"type": "boxes"}}
    held = locate(extra_body=shape).choices[0].message
    assert held.model_extra == free.model_extra
    (box,) = held.model_extra["boxes"]
    assert box["label"] == "hollow gray hexagon"
    assert box["xyxy"] == pytest.approx([80, 88, 108, 120], abs=8)
    assert "<|box_start|>" in held.model_extra["raw_text"]
    caption = ask_about_scene(client, extra_body=shape).choices[0].message
    starts = "<|box_start|>", "<|object_ref_start|>", "<|im_e"
    assert caption.model_extra["raw_text"].startswith(starts)
    points = locate(extra_body={"response_format": {"type": "points"}}).choices[0].message
    assert all(one["xyxy"][:2] == one["xyxy"][2:] for one in points.model_extra["boxes"])


def test_parameters_of_vllm_clients(locate):
    neutral = load_cases("request_bodies")["neutral"]
    plain = locate().choices[0].message
    assert locate(extra_body=neutral).choices[0].message.to_dict() == plain.to_dict()
    shown = locate(extra_body=REQUEST_PARAMETERS).choices[0].message
    assert "<|box_start|>" in shown.content
    assert "<|box_start|>" not in plain.content
    assert plain.model_extra["raw_text"] == f"{shown.content}<|im_end|>"
    assert shown.model_extra == plain.model_extra
    chunks = locate(extra_body=REQUEST_PARAMETERS, stream=True)
    assert join_stream(chunks) == shown.content
    stopped = locate(stop="<|box_start|>", extra_body=REQUEST_PARAMETERS).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == shown.content.partition("<|box_start|>")[0]


ROW = make_object_schema(row={"type": "integer", "minimum": 1, "maximum": 9})
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("book", ROW), ("stop", make_object_schema()))
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_tool_call_and_result(ask_about_scene, client, choice):
    given = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 80}
    found = ask_about_scene(client, **given).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert call.type == "function"
    assert call.function.name in ({"book"} if choice != "required" else {"book", "stop"})
    assert isinstance(json.loads(call.function.arguments), dict)
    chunks = list(ask_about_scene(client, stream=True, **given))
    streamed = [c for k in chunks for x in k.choices for c in x.delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in streamed] == [(0, call.function.name)]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages = [*make_messages("Book a seat."), found.message, result]
    answered = ask_about_scene(client, messages=messages, tools=TOOLS, max_tokens=4)
    assert answered.usage.completion_tokens >= 1


def test_messages_of_a_conversation(ask_about_scene, client):
    first = make_messages("Who are you?")
    output = ask_about_scene(client, messages=first, max_tokens=6).choices[0].message
    more = [{"role": "system", "content": "Be short."}, *first, output, *make_messages("And now?")]
    assert ask_about_scene(client, messages=more, max_tokens=6).usage.prompt_tokens > 20
    # Clients send back the empty answer of a model that generated an end token first.
    messages = [*make_messages("a"), *make_messages("b")]
    expected = ask_about_scene(client, messages=messages, max_tokens=4)
    for empty in (None, ""):
        messages = [messages[0], {"role": "assistant", "content": empty}, messages[-1]]
        found = ask_about_scene(client, messages=messages, max_tokens=4)
        assert found.choices[0].message.content == expected.choices[0].message.content


def test_uploaded_files(ask_about_scene, client, server, scenes):
    input_image = scenes[0].read_bytes()
    retained = client.files.create(file=("../../evil.png", input_image), purpose="vision")
    assert retained.filename == "../../evil.png"
    assert retained.bytes == len(input_image)
    # The name is not a path: the file is in the folder of the server under its ID.
    inside = [path.name for path in (server.folder / "files").iterdir()]
    assert retained.id in inside
    assert not any("evil" in path.name for path in server.folder.parent.rglob("*"))
    assert retained.id in [file.id for file in client.files.list()]
    assert client.files.retrieve(retained.id).bytes == len(input_image)
    part = {"type": "file", "file": {"file_id": retained.id}}
    found = ask_about_scene(client, messages=make_messages(part, PROMPT))
    assert found.choices[0].message.content == ask_about_scene(client).choices[0].message.content
    assert client.files.delete(retained.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(retained.id)
    with pytest.raises(NotFoundError) as raised:
        ask_about_scene(client, messages=make_messages(part, PROMPT))
    assert raised.value.body["param"] == "messages.0.content.0"
    with pytest.raises(BadRequestError, match="not an image"):
        client.files.create(file=("a.png", b"no picture"), purpose="vision")
    with pytest.raises(BadRequestError, match="purpose"):
        client.files.create(file=("a.png", input_image), purpose="batch")


INVALID_MESSAGES: tuple[list[Any], ...] = (
    [],
    [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": "a"}],
    [*make_messages("a"), {"role": "assistant", "content": "b"}],
    make_messages("a" * 1_000_001),
    make_messages("word " * 190_000),
    make_messages(*[make_image_part("data:,")] * 33),
)


@pytest.mark.parametrize(
    ("given", "param"),
    [*load_cases("chat_requests"), *(({"messages": one}, "messages") for one in INVALID_MESSAGES)],
)
def test_invalid_requests_are_rejected(ask_about_scene, client, server, given, param):
    with pytest.raises(BadRequestError) as raised:
        ask_about_scene(client, **given)
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert (body["param"] or "").split(".")[0] == (param or "")
    assert body["message"]


NAMES = ("tickets", "formulas")
IMAGE_BYTES = make_noise_png(84, 84, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, and adapters of different parts that change its answers."""
    folder = tmp_path_factory.mktemp("adapters")
    base = create_tiny_model(folder / "base")
    for name, how in zip(NAMES, ("language", "all parts"), strict=True):
        model = load_model(ModelFolder(base), torch.float32, torch.device("cpu"))
        configure_tuning(model, TuneSettings.model_validate(TUNE_SETTINGS[how]), seed=0)
        randomize_parameters(
            factor for _, _, one in iter_adapters(model) for factor in one.parameters()
        )
        (folder / name).mkdir()
        save_adapter(folder / name, model.eval(), base_model=str(base))
    return {name: folder / name for name in (*NAMES, "base")}


@pytest.fixture(scope="module")
def multi_adapter_server(
    folders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    first, *more = (str(folders[name]) for name in NAMES)
    inference_model = load_multi_adapter_model(first, more, "cpu", "fp32")
    with run_server(inference_model, tmp_path_factory.mktemp("several")) as server:
        yield server


def test_adapters_without_an_own_name_are_rejected(folders, tmp_path):
    """The name base selects the base model."""
    named_base = shutil.copytree(folders[NAMES[0]], tmp_path / "base")
    for first, more, message in (
        (named_base, (), "has the name base, which selects the base model"),
        (folders[NAMES[1]], (named_base,), "has the name base, which selects the base model"),
        (folders[NAMES[0]], (folders["base"],), "is the base model, not an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            load_multi_adapter_model(str(first), [str(path) for path in more], "cpu", "fp32")


def test_each_adapter_answers_like_alone(multi_adapter_server, folders, tmp_path):
    client = multi_adapter_server.client()
    assert [model.id for model in client.models.list()] == [*NAMES, "base"]
    (tmp_path / "a.png").write_bytes(IMAGE_BYTES)
    parts = (ImagePart(image="a.png"), TextPart(text="What is it?"))
    messages = (Message(role="user", content=parts),)
    sample = LocatedSample(Sample(id="a", messages=messages), tmp_path)
    question = make_messages(make_image_part(make_data_url(IMAGE_BYTES)), "What is it?")
    answers = []
    for name, folder in folders.items():
        alone = load_inference_model(str(folder), "cpu", "fp32")
        given = {"max_new_tokens": 12, "batch_size": 1}
        (expected,) = predict(alone.model, alone.renderer, [sample], **given)
        found = client.chat.completions.create(model=name, messages=question, max_tokens=12)
        assert found.model == name
        assert found.choices[0].message.model_extra["raw_text"] == expected.raw_text
        answers.append(expected.raw_text)
    assert len(set(answers)) == 3
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")
    wait_until_idle(multi_adapter_server)
