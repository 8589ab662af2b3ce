"""Each way to ask a run has the prompt of its training, token by token.

A model that was trained with the text before the image answers worse if the image comes first.
"""

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import LIMITS, run_server, send_request
from starlette.testclient import TestClient
from tiny_task import TinyTask, edit_samples
from web_server_fixture import get_image_pool

from finesight import api
from finesight.app.chat_page import make_chat_app
from finesight.app.server import Access
from finesight.cli.app import run_command
from finesight.evaluate import generation_eval
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_multi_adapter_model
from finesight.infer.request import GenerationOptions
from finesight.label.label_session import open_session
from finesight.operations.training import train
from finesight.samples.prompt_format import PromptFormat
from finesight.samples.sample import LocatedSample, Message, read_samples
from finesight.serve.label_studio_backend import LabelStudioOptions
from finesight.serve.media_sources import LabelStudioImages

PROMPT = "Which colour is it? "
SYSTEM_PROMPT = "Name the colour."
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


FORMS: Mapping[str, list[dict[str, Any]]] = {
    "image first": [IMAGE, text(PROMPT)],
    "text first": [text(PROMPT), IMAGE],
    "line break": [text(PROMPT + "\n"), IMAGE],
    "both sides": [text("See "), IMAGE, text(" " + PROMPT)],
    "fixed text": [text("Image: "), IMAGE, text(" {} " + PROMPT)],
    "further turn": [text(PROMPT), IMAGE],
}
"""Content of the questions, in which `{}` is the number of the sample."""


class AskedRun:
    """A trained run, an image of its training, and the token IDs of its training prompt."""

    def __init__(self, folder: Path, form: list[dict[str, Any]]) -> None:
        self.folder = folder
        task = TinyTask(folder)
        self.image = folder / "train0.png"
        for name in ("train", "eval"):
            with edit_samples(folder / f"{name}.jsonl") as samples:
                for number, sample in enumerate(samples):
                    parts = []
                    for part in form:
                        if part is IMAGE:
                            parts.append({"type": "image", "image": f"{sample['id']}.png"})
                        else:
                            parts.append(text(part["text"].format(number)))
                    sample["messages"][0]["content"] = parts
                    if form is FORMS["further turn"]:
                        sample["messages"] += [
                            {"role": "user", "content": "Which other one?"},
                            {"role": "assistant", "content": "None."},
                        ]
                    sample["messages"].insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        recipe = task.recipe | {"output_dir": str(folder / "run"), "eval": {"metric": "qa"}}
        recipe["train"] = recipe["train"] | {"epochs": None, "steps": 1}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        self.outcome = train(folder / "recipe.yaml")
        self.run = folder / "run"
        self.model = load_multi_adapter_model(str(self.run), (), "cpu", "fp32")
        self.expected = self.encode_first_question("train")
        # What a user types, who knows the last text of the question only.
        self.prompt = form[-1 if form[-1] is not IMAGE else 0]["text"].format(0)

    def encode_first_question(self, split: str, number: int = 0) -> list[int]:
        """Return the token IDs of the prompt of the first answer of a sample."""
        sample = read_samples(self.folder / f"{split}.jsonl")[number]
        first = sample.model_copy(update={"messages": sample.messages[:3]})
        return self.encode(LocatedSample(first, self.folder))

    def encode(self, located: LocatedSample) -> list[int]:
        return self.model.renderer.tokenize_prompt(located).ids_T.tolist()


@pytest.fixture(scope="module", params=FORMS)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AskedRun:
    folder = tmp_path_factory.mktemp("asked")
    return AskedRun(folder / "task", FORMS[request.param])


@pytest.fixture
def prompts(asked: AskedRun, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token IDs of the prompts that the inference service receives."""
    found: list[list[int]] = []
    submit = InferenceService.submit

    def record(service: Any, located: LocatedSample, options: Any, prompt: Any = None, **more: Any):
        ids = asked.encode(located) if prompt is None else prompt.tokenized.ids_T.tolist()
        found.append(ids)
        return submit(service, located, replace(options, max_new_tokens=1), prompt, **more)

    monkeypatch.setattr(InferenceService, "submit", record)
    return found


@pytest.fixture
def service(asked: AskedRun) -> Iterator[InferenceService]:
    running = InferenceService(asked.model, max_num_seqs=1)
    yield running
    running.close()


def test_commands_ask_like_the_training(asked, tmp_path, monkeypatch, capsys):
    """Also with the white space that terminals and forms lose, and as training proposes it."""
    found: list[LocatedSample] = []
    monkeypatch.setattr(
        generation_eval,
        "predict",
        lambda model, renderer, samples, **options: found.extend(samples) or [],
    )
    for prompt in (asked.prompt, asked.prompt.strip()):
        words = ["predict", str(asked.run), str(asked.image), "--prompt", prompt]
        assert run_command([*words, "--device", "cpu"]) == 0
    assert "several forms" not in capsys.readouterr().err
    (step,) = [one for one in asked.outcome.next_steps if one.operation == "predict"]
    words = shlex.split(str(step))
    assert run_command([*words[1:], "--device", "cpu"]) == 0
    proposed = found.pop()
    expected = [asked.encode_first_question("eval", number) for number in range(3)]
    assert asked.encode(proposed) in expected
    assert [asked.encode(one) for one in found] == [asked.expected] * 2


def test_python_asks_like_the_training(asked, monkeypatch):
    model = api.load_model(asked.run, device="cpu")
    assert asked.encode(model.build_question(asked.image, asked.prompt)) == asked.expected
    question = model.build_question(str(asked.image), asked.prompt.strip())
    encoding = model.encode(question, add_generation_prompt=True)
    assert encoding.input_ids.tolist() == asked.expected
    answer = model.generate(asked.image, asked.prompt, max_new_tokens=1)
    trained = read_samples(asked.folder / "train.jsonl")[0]
    first = trained.model_copy(update={"messages": trained.messages[:3]})
    expected = model.generate_batch([LocatedSample(first, asked.folder)], max_new_tokens=1)
    assert answer.raw_text == expected[0].raw_text
    image = {"type": "image", "image": str(asked.image)}
    content = [image, text(asked.prompt)]
    messages = model.arrange([Message.model_validate({"role": "user", "content": content})])
    assert messages == model.build_question(asked.image, asked.prompt).sample.messages


def test_chat_asks_like_the_training(asked, prompts, service):
    options = [GenerationOptions(max_new_tokens=1)]
    chat = ChatSession(service)
    turn = chat.send(asked.prompt.strip(), [asked.image], options)
    list(turn.replies[0])
    assert prompts == [asked.expected]
    own = ChatSession(service, system_prompt="Another.")
    list(own.send(asked.prompt, [asked.image], options).replies[0])
    assert prompts[1] != asked.expected
    # A saved conversation is a sample like those of the training.
    for sample in chat.to_samples(str):  # none for an empty answer
        assert asked.encode(LocatedSample(sample, Path())) == asked.expected


def test_chat_page_asks_like_the_training(asked, prompts, service, tmp_path):
    app = make_chat_app(service, tmp_path, get_image_pool(), Access())
    with TestClient(app, "http://127.0.0.1") as client:
        page = client.get("/").text
        assert SYSTEM_PROMPT in page
        content = asked.image.read_bytes()
        images = client.post("/uploads", params={"name": "a.png"}, content=content).json()
        body = {"text": asked.prompt, "images": images}
        assert client.post("/answers", json=body).status_code == 200
    assert prompts == [asked.expected]


def test_server_and_label_studio_ask_like_the_training(asked, prompts, tmp_path, caplog):
    images = LabelStudioImages(asked.folder, None, None, LIMITS)
    options = {"label_studio": LabelStudioOptions(images, asked.prompt)}
    prompt_format = PromptFormat.from_run(asked.run)
    with run_server(asked.model, tmp_path, **options) as server:
        url = f"data:image/png;base64,{encode_base64(asked.image)}"
        body: dict[str, Any] = {"model": server.service.model_names[0], "max_tokens": 1}
        for content in (
            prompt_format.build_request_content(asked.prompt, [url]),
            [{"type": "image_url", "image_url": {"url": url}}, text("Another question?\n\n")],
        ):
            body["messages"] = [{"role": "user", "content": content}]
            status, _, _ = send_request(server, "POST", "/v1/chat/completions", json.dumps(body))
            assert status == 200
        config = '<View><Image name="img" value="$photo"/><TextArea name="n" toName="img"/></View>'
        task = {"id": 1, "data": {"photo": asked.image.name}}
        body = {"tasks": [task], "label_config": config}
        send_request(server, "POST", "/label-studio/predict", json.dumps(body))
        _, models, _ = send_request(server, "GET", "/v1/models")
    assert [prompts[0], prompts[2]] == [asked.expected] * 2
    # A request keeps the order of its parts, and the log tells that it differs.
    assert prompts[1] != asked.expected
    assert caplog.text.count("another order or white space") == 1
    templates = [one.template for one in prompt_format.templates]
    assert models["data"][0]["prompt_templates"] == templates


def test_labels_ask_like_the_training(asked, tmp_path):
    options = {"prompt": asked.prompt.strip()}
    with open_session(tmp_path / "labels", str(asked.run), [asked.image], **options).store as store:
        (item,) = store.items
        assert asked.encode(item.sample) == asked.expected


def encode_base64(file: Path) -> str:
    found = subprocess.run(["base64", "-w0", str(file)], capture_output=True, text=True, check=True)
    return found.stdout
