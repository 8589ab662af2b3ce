"""Code for programs that ask a server of the studio, its key, and a test of the server."""

import ast
import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from studio_fixtures import RUNNING, open_client, read_live, write_job
from web_server_fixture import get_image_pool, run_app

from finesight.app.jobs import Job
from finesight.app.key_file import load_key_file
from finesight.app.program_use import (
    KEY_MARK,
    Content,
    build_default_content,
    list_snippets,
    read_example_content,
)
from finesight.app.workspace import Workspace
from finesight.files.storage import write_file
from finesight.samples.sample import ImagePart, Message, Sample, TextPart, write_samples

ADDRESS = "http://127.0.0.1:7/v1"
PROMPT = f"What's \"this\"?\\ $(touch hacked) `touch hacked` {{x}} \u202e''' </pre> {KEY_MARK}\n%s"
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run with a question about two images of the workspace."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "state"))
    write_question(folder, "photos/00.png", "photos/01.png")
    run = folder / "runs/a"
    run.mkdir(parents=True)
    recipe = "model: finesight-tiny\ndata: {train: data/a/train.jsonl}\noutput_dir: runs/a\n"
    (run / "recipe.yaml").write_text(recipe)
    (run / "manifest.json").write_text("{}")
    return run


def write_question(folder: Path, *images: str, text: str = "Which color?") -> None:
    parts = [ImagePart(image=f"../../{image}") for image in images]
    question = Message(role="user", content=(*parts, TextPart(text=text)))
    answer = Message(role="assistant", content=(TextPart(text="red"),))
    (folder / "data/a").mkdir(parents=True, exist_ok=True)
    sample = Sample(id="1", messages=(question, answer))
    write_samples(folder / "data/a/train.jsonl", [sample])


def read_content(folder: Path) -> Content | None:
    return read_example_content(Workspace(folder, get_image_pool()), Path("runs/a"))


def test_example_is_the_first_question_of_the_run(folder, run):
    content = read_content(folder)
    assert content is not None
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == "Which color?"
    assert base64.b64decode(content[0]["image_url"]["url"].partition("base64,")[2])


@pytest.mark.parametrize(
    "image", ["../secret.png", "link.png", "gone.png", "photos/00.txt", "a\0.png"]
)
def test_example_has_no_image_from_elsewhere(folder, run, image):
    secret = folder.parent / "secret.png"
    secret.write_bytes((folder / "photos/00.png").read_bytes())
    (folder / "link.png").symlink_to(secret)
    write_question(folder, image)
    assert read_content(folder) is None


def read_code(text: str, name: str, num_images: int = 1) -> str:
    content: Content = [IMAGE] * num_images + [{"type": "text", "text": text}]
    snippets = list_snippets(ADDRESS, "a'\"b", content, has_key=True)
    (snippet,) = [one for one in snippets if one.name == name]
    assert len(snippet.pieces) == 2, "the question is no place of the key"
    return "the-key".join(snippet.pieces)


def test_code_has_the_question_of_the_run():
    """The question of a foreign data set stays a text, in each language."""
    tree = ast.parse(read_code(PROMPT, "Python"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert PROMPT in texts
    assert {"the-key", "a'\"b", ADDRESS, "photo.jpg"} <= {*texts}
    script = read_code(PROMPT, "JavaScript")
    (line,) = [line for line in script.splitlines() if '"text":' in line]
    assert json.loads(line.strip().rstrip(","))["text"] == PROMPT
    for name in ("Python", "JavaScript", "curl"):
        assert "\u202e" not in read_code(PROMPT, name)


@pytest.mark.parametrize("text", [PROMPT, "\0photo-1.jpg\0", "\0photo-2.jpg\0 data"])
def test_command_sends_the_question(tmp_path, text):
    """A shell executes nothing of the question, and puts each image into its place."""
    names = ("photo-1.jpg", "photo-2.jpg")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\ncat > body; for one; do echo "$one"; done > words\n')
    curl.chmod(0o700)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", "-c", read_code(text, "curl", 2)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    body = json.loads((tmp_path / "body").read_text())
    first, second, question = body["messages"][0]["content"]
    for name, part in zip(names, (first, second), strict=True):
        url = part["image_url"]["url"]
        assert base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) == name.encode()
    assert (body["model"], question["text"]) == ("a'\"b", text.replace("\0", ""))
    words = (tmp_path / "words").read_text().splitlines()
    assert words[0] == f"{ADDRESS}/chat/completions"
    assert "Authorization: Bearer the-key" in words
    assert not (tmp_path / "hacked").exists()


def test_code_without_a_key():
    for snippet in list_snippets(ADDRESS, "a", build_default_content(""), has_key=False):
        assert len(snippet.pieces) == 1
        assert "Describe the image." in snippet.pieces[0]
        assert KEY_MARK not in snippet.pieces[0]


class FakeServer:
    """HTTP API that records its requests and gives one answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.address = ""
        self.answer: Response = JSONResponse({"choices": [{"message": {"content": "<b>red</b>"}}]})

    async def post(self, request: Request) -> Response:
        key = request.headers.get("authorization", "")
        self.requests.append((key, await request.json()))
        return self.answer


@contextmanager
def run_server(folder: Path, *words: str, log: str = "") -> Iterator[FakeServer]:
    """Run a server, and write its running command."""
    fake = FakeServer()
    app = Starlette(routes=[Route("/v1/chat/completions", fake.post, methods=["POST"])])
    with run_app(app) as port:
        fake.address = f"http://127.0.0.1:{port}/v1"
        log = log or f"loading\nserving a, base at {fake.address}\n  curl x\n"
        arguments = " ".join(("serve", "runs/a", *words))
        values: dict[str, Any] = {"target": "runs/a", "port": port, "exit_code": None}
        write_job(folder, "export", arguments, log=log, **values)
        yield fake
    RUNNING.pop().close()


def test_page_tests_a_server_with_its_key(folder, run, monkeypatch):
    key_file = load_key_file()
    key = key_file.read_text().strip()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(Job, "is_ready", True)
    with run_server(folder, "--key-file", str(key_file)) as server, open_client(folder) as client:
        shown = read_live(folder, "step=export&run=runs/a")["bottom"]
        assert key not in shown
        assert shown.count('class="api-key"') == 3
        answer = client.post("/servers/1/test", json={})
        assert answer.json()["answer"] == "<b>red</b>"
        assert len(answer.json()["images"]) == 2
        ((header, body),) = server.requests
        assert (header, body["model"]) == (f"Bearer {key}", "a")
        found = client.post("/servers/1/key", json={})
        assert (found.json(), found.headers["cache-control"]) == ({"key": key}, "no-store")
        for path in ("/servers/1/key", "/servers/1/test"):
            assert client.get(path).status_code == 405
            other = {"origin": "http://evil.example"}
            assert client.post(path, json={}, headers=other).status_code == 403
            assert client.post(path.replace("1", "2"), json={}).status_code == 422
        assert key not in (folder / ".finesight/jobs/1/log.txt").read_text()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ({"error": {"message": "<i>busy</i>"}}, 429, "<i>busy</i>"),
        ({"choices": []}, 200, "the reply of the server has no answer"),
        ([], 200, "the reply of the server has no answer"),
        ("deep", 200, "the reply of the server has no answer"),
        ({"choices": [{"message": {"content": "x" * 2_000_000}}]}, 200, "has no answer"),
    ],
)
def test_answers_of_a_failing_server_are_errors(folder, run, content, status, message):
    with run_server(folder) as server, open_client(folder) as client:
        server.answer = JSONResponse(content, status)
        if content == "deep":
            server.answer = Response("[" * 100_000)
        answer = client.post("/servers/1/test", json={})
        assert (answer.status_code, message in answer.json()["error"]) == (422, True)
        # A failed test does not block the next one.
        server.answer = JSONResponse({"choices": [{"message": {"content": "green"}}]})
        assert client.post("/servers/1/test", json={}).json()["answer"] == "green"
        assert server.requests[0][0] == "", "a server without a key"


def test_key_follows_no_redirect(folder, run):
    with run_server(folder) as other, run_server(folder) as server, open_client(folder) as client:
        server.answer = RedirectResponse(f"{other.address}/chat/completions", 307)
        assert client.post("/servers/1/test", json={}).status_code == 422
        assert other.requests == []


def test_key_goes_only_to_a_server_that_has_its_port(folder, run):
    """Before, another program may listen at the port; a received workspace may name any file."""
    key_file = load_key_file()
    with (
        run_server(folder, "--key-file", str(key_file), log="loading\n") as server,
        open_client(folder) as client,
    ):
        for name in ("key", "test"):
            answer = client.post(f"/servers/1/{name}", json={})
            assert "the server is not running" in answer.json()["error"]
        assert server.requests == []
    foreign = folder / "foreign-key"
    write_file(foreign, b"x" * 40)
    with (
        run_server(folder, "--key-file", str(foreign)) as server,
        open_client(folder) as client,
    ):
        for name in ("key", "test"):
            answer = client.post(f"/servers/1/{name}", json={})
            assert "a key of its own" in answer.json()["error"]
        assert server.requests == []
    # A stopping server has closed its port, at which another account may listen.
    with run_server(folder) as server, open_client(folder) as client:
        (folder / ".finesight/jobs/1/stop_requested").touch()
        answer = client.post("/servers/1/test", json={})
        assert "the server is not running" in answer.json()["error"]
        assert server.requests == []
    (folder / ".finesight/jobs/1/stop_requested").unlink()
    ended = {"target": "runs/a", "port": 7, "exit_code": 0}
    log = f"serving a at {ADDRESS}\n"
    write_job(folder, "export", "serve runs/a", log=log, **ended)
    (folder / ".finesight/jobs/1/lock").unlink(missing_ok=True)
    with open_client(folder) as client:
        assert client.post("/servers/1/test", json={}).status_code == 422


def test_server_without_example_has_code_only(folder, run, monkeypatch):
    monkeypatch.setattr(Job, "is_ready", True)
    write_question(folder, "gone.png")
    with run_server(folder) as server, open_client(folder) as client:
        shown = read_live(folder, "step=export&run=runs/a")["bottom"]
        assert 'data-program="test"' not in shown
        assert "Which color?" in re.sub("&#34;", '"', shown)
        assert "all accounts of this machine" in shown
        answer = client.post("/servers/1/test", json={})
        assert "there is no example image" in answer.json()["error"]
        assert server.requests == []
