"""Tests of suggestions of a teacher behind an OpenAI-compatible server."""

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from label_fixtures import draw_images
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from web_server_fixture import run_app

from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.label import teacher as teacher_module
from finesight.label.label_session import LabelSession, open_session
from finesight.label.teacher import FRAMES, TEACHER_FILE, Teacher, TeacherSettings
from finesight.samples.sample import ImagePart, Message, Sample, TextPart, write_samples

KEY = "sk-secret"
MODELS = [{"id": "owl"}, {"id": "fox"}]
RED_BOX = (250, 500, 1000, 1200)
"""Rectangle in images of 2000 x 1500 pixels."""


@dataclass
class ScriptedTeacher:
    """Server that finds red rectangles in a frame, or gives scripted answers in turn.

    Attributes:
        replies: Contents or choices of the answers, or else responses with an error, in turn.
        rejected: Settings of a request that it does not know.
    """

    frame: str = "pixels"
    replies: list[Any] = field(default_factory=list)
    rejected: tuple[str, ...] = ()
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    models: Response = field(default_factory=lambda: JSONResponse({"data": MODELS}))
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def make_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", lambda request: self.models),
            ]
        )

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.keys.add(request.headers.get("authorization"))
        for name in self.rejected:
            if name in body:
                return JSONResponse({"error": {"message": f"unsupported: '{name}'"}}, 400)
        self.requests.append(body)
        choices = []
        for _ in range(body.get("n", 1)):
            reply = self.replies.pop(0) if self.replies else self.find(body)
            if isinstance(reply, Response):
                return reply
            reply = {"message": {"content": reply}} if isinstance(reply, str) else reply
            choices.append({"finish_reason": "stop", **reply})
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return JSONResponse({"choices": choices, "usage": usage})

    def find(self, body: dict[str, Any]) -> str:
        """Answer with the corners of the red pixels in the frame of the teacher."""
        parts = body["messages"][-1]["content"]
        url = next(part["image_url"]["url"] for part in parts if "image_url" in part)
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        self.sizes.add(image.size)
        is_red = image.convert("RGB").split()[1].point(lambda green: 255 * (green < 100))
        numbers = [*map(float, is_red.getbbox())]
        if self.frame != "pixels":
            sides = image.size * 2
            numbers = [1000 * n / side for n, side in zip(numbers, sides, strict=True)]
        if self.frame == "thousandths-yx":
            numbers = [numbers[index ^ 1] for index in range(4)]
        return f"```json\n{json.dumps({'objects': [{'label': 'sign', 'bbox_2d': numbers}]})}\n```"


@contextmanager
def serve(teacher: ScriptedTeacher) -> Iterator[Callable[..., dict[str, str]]]:
    """Yield a function that lets a teacher suggest answers for a session.

    It returns the reasons of the samples without one.
    """
    with run_app(teacher.make_app()) as port:

        def suggest(session: LabelSession, **options: Any) -> dict[str, str]:
            url = f"http://127.0.0.1:{port}/v1"
            settings = TeacherSettings(url, "owl", "TEACHER_KEY", **options)
            session.model = settings.name
            with session.store:
                return session.add_suggestions(Teacher(settings, session, print).suggest)

        yield suggest


def open_photos(folder: Path, count: int = 1, **options: Any) -> LabelSession:
    photos, options = folder / "photos", {"prompt": "Read.", **options}
    if not photos.exists():
        draw_images(folder, count)
    return open_session(folder / "labels", "finesight-tiny", [photos], **options)


def list_suggested(session: LabelSession) -> dict[str, tuple[Any, float]]:
    """Return answer and confidence by file name, least certain first."""
    items = [item for item in session.store.items if item.suggestion]
    pairs = [(item.suggestion.content, item.suggestion.confidence) for item in items]
    return {item.images[0].name: pair for item, pair in zip(items, pairs, strict=True)}


@pytest.mark.parametrize("frame", FRAMES)
def test_boxes_are_in_pixels_of_the_original_image_in_any_frame(tmp_path, monkeypatch, frame):
    """The frame is found by a drawn rectangle. Settings that a server rejects are left out."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    photos = draw_images(tmp_path, 0)
    image = Image.new("RGB", (2000, 1500), "white")
    image.paste((200, 0, 0), RED_BOX)
    image.save(photos / "a.png")
    settings = ("response_format", "temperature", "n", "max_tokens")
    teacher = ScriptedTeacher(frame, rejected=settings)
    with serve(teacher) as suggest:
        session = open_photos(tmp_path, kind="boxes", choices=["sign"])
        assert suggest(session, pixels=500_000) == {}
        ((content, confidence),) = list_suggested(session).values()
        assert (content[0].label, confidence) == ("sign", pytest.approx(1.0))
        assert content[0].xyxy == pytest.approx(RED_BOX, abs=6)
        assert teacher.sizes == {(640, 480), (816, 612)}
        # The drawn rectangle once, and three answers.
        assert (len(teacher.requests), teacher.keys) == (4, {f"Bearer {KEY}"})
        # Suggestions for other settings use the known answers.
        session = open_photos(tmp_path, kind="boxes", choices=["sign"])
        assert suggest(session, pixels=500_000, answers=2) == {}
        assert len(teacher.requests) == 4


RED, BLUE = '{"color": "red", "n": 1}', '{"color": "blue", "n": 1}'
REFUSAL = {"message": {"content": None, "refusal": "not this one"}}


def test_agreement_is_the_confidence_and_answers_are_requested_once(tmp_path):
    """No answer for the third image is valid, and the budget ends before the last one."""
    cut_off = {"message": {"content": '{"color'}, "finish_reason": "length"}
    overloaded = JSONResponse({"error": "busy"}, 429, {"retry-after": "1"})
    replies = [RED, RED, RED, overloaded, BLUE, RED, REFUSAL, REFUSAL, cut_off, "I see."]
    options = {"kind": "fields", "field_names": ["color", "n"]}
    teacher = ScriptedTeacher(replies=replies)
    with serve(teacher) as suggest:
        session = open_photos(tmp_path, 4, **options)
        reasons = suggest(session, concurrency=1, budget=4)
        assert list_suggested(session) == {
            "1.png": ((TextPart(text=BLUE),), pytest.approx(0.25)),
            "0.png": ((TextPart(text=RED),), 1.0),
        }
        parts = [part.confidence for part in session.store.items[0].suggestion.parts]
        assert parts == [0.0, 0.5]
        problems = [reason.partition(": ")[2] for reason in reasons.values()]
        assert "no JSON object" in problems[0]
        assert "budget of 4 requests" in problems[1]
        schema = teacher.requests[0]["response_format"]["json_schema"]["schema"]
        assert schema["required"] == ["color", "n"]
        assert len(session.store.items) == 4
        # A crash leaves half a line.
        with (tmp_path / "labels" / TEACHER_FILE).open("a") as file:
            file.write('{"key": "')
        teacher.replies = [RED, RED, RED]
        assert len(suggest(open_photos(tmp_path, **options), answers=2, concurrency=1)) == 1
        assert [request["n"] for request in teacher.requests] == [3, 3, 3, 3, 2]


def test_review_lists_the_most_contradicted_labels_first(tmp_path):
    draw_images(tmp_path, 2)
    answer, samples = Message(role="assistant", content="red"), []
    for name in ("0.png", "1.png"):
        content = (ImagePart(image=f"photos/{name}"), TextPart(text="Color?"))
        messages = (Message(role="user", content=content), answer)
        samples.append(Sample(id=name, messages=messages))
    write_samples(tmp_path / "a.jsonl", samples)
    teacher = ScriptedTeacher(replies=["Red", "red", "blue", "blue"])
    with serve(teacher) as suggest:
        session = open_session(
            tmp_path / "labels",
            "finesight-tiny",
            [tmp_path / "a.jsonl"],
            review=True,
            kind="classes",
            choices=["red", "blue"],
        )
        assert suggest(session, answers=2, concurrency=1) == {}
        scores = [(item.sample.sample.id, item.suggestion.score) for item in session.store.items]
        assert scores == [("1.png", 1.0), ("0.png", 0.0)]
        assert [part["role"] for part in teacher.requests[0]["messages"]] == ["user"]


def test_command_prints_suggestions_of_a_server(tmp_path, monkeypatch, capsys):
    """Without an extra, a page or a key, and with the colors of the user as an enumeration."""
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path, 2)
    teacher = ScriptedTeacher(replies=["Red", "red", '{"answer": "blue"}', "green"])
    words = [*("label", "finesight-tiny", "photos", "--prompt", "Color?", "--kind", "classes")]
    words += ["--classes", "red,blue", "--suggest-only", "--json", "--teacher-concurrency", "1"]
    with run_app(teacher.make_app()) as port:
        words += ["--teacher", f"http://127.0.0.1:{port}/v1", "--teacher-answers", "2"]
        assert run_command(words) == 2
        assert "--teacher-model" in capsys.readouterr().err
        words += ["--teacher-model", "owl"]
        assert run_command(words) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(one["suggestion"]["text"], one["confidence"]) for one in records]
    assert found == [("blue", 0.0), ("red", 1.0)]
    assert teacher.keys == {None}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (JSONResponse({"error": {"message": f"wrong key {KEY}"}}, 401), ["export TEACHER_KEY"]),
        (JSONResponse({"detail": "no model"}, 404), ["no model", "owl, fox", "--teacher-model"]),
        (JSONResponse({"error": {"code": "insufficient_quota"}}, 429), ["insufficient_quota"]),
        (JSONResponse({}, 429, {"retry-after": "86400"}), ["status 429"]),
        (RedirectResponse("http://127.0.0.1:1/", 307), ["status 307"]),
        (JSONResponse({"choices": [{}]}), ["not a chat completion"]),
        (Response(b"<html>"), ["<html>"]),
    ],
)
def test_errors_of_the_server_name_the_cause(tmp_path, monkeypatch, reply, words):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serve(ScriptedTeacher(replies=[reply])) as suggest, pytest.raises(UserError) as caught:
        suggest(open_photos(tmp_path))
    message = str(caught.value)
    assert KEY not in message
    assert all(word in message for word in words), message


def trickle(*first: bytes) -> StreamingResponse:
    """Answer with some bytes, and then with one byte after the other, forever."""

    async def iterate() -> AsyncIterator[bytes]:
        for chunk in first:
            yield chunk
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    return StreamingResponse(iterate(), headers={"content-type": "application/json"})


def flood() -> StreamingResponse:
    """Answer without an end."""

    async def iterate() -> AsyncIterator[bytes]:
        while True:
            yield b"[" * (1 << 20)
            await asyncio.sleep(0)  # lets the server notice the end of the connection

    return StreamingResponse(iterate())


@pytest.mark.parametrize(
    ("make_reply", "words"), [(trickle, "no complete response"), (flood, "over 16777216 bytes")]
)
def test_endless_responses_are_ended(tmp_path, monkeypatch, make_reply, words):
    monkeypatch.setattr(teacher_module, "MAX_REQUEST_SECONDS", 1.0)
    if make_reply is flood:
        monkeypatch.setattr(teacher_module, "MAX_REQUEST_SECONDS", 60.0)
    teacher = ScriptedTeacher(replies=[make_reply()])
    with serve(teacher) as suggest, pytest.raises(UserError, match=words) as caught:
        suggest(open_photos(tmp_path))
    assert len(teacher.requests) == 1
    assert "--max-new-tokens" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "make_reply", [trickle, flood, lambda: JSONResponse({"data": [{"id": f"owl {KEY}"}]})]
)
def test_list_of_models_is_limited_and_without_the_key(tmp_path, monkeypatch, make_reply):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr(teacher_module, "MAX_LISTING_SECONDS", 1.0)
    teacher = ScriptedTeacher(replies=[JSONResponse({"detail": "no model"}, 404)])
    teacher.models = make_reply()
    with serve(teacher) as suggest, pytest.raises(UserError, match="no model") as caught:
        suggest(open_photos(tmp_path))
    assert KEY not in str(caught.value)
    assert ("owl ***" in caught.value.expected) == isinstance(teacher.models, JSONResponse)


LONG_ANSWERS = {
    "text": "a" * 2_000_000,
    "brackets": "[" * 4_000_000,
    "objects": '{"a":' * 400_000,
    "spaces": f"x{' ' * 1_000_000}x",
    "boxes": json.dumps({"objects": [{"label": "sign", "bbox_2d": [1, 2, 3, 4]}] * 350}),
    "thoughts": f"<think>{'a' * 2_000_000}</think>red",
}


@pytest.mark.parametrize("name", LONG_ANSWERS)
@pytest.mark.parametrize("kind", ["fields", "boxes", "text"])
def test_long_answers_are_cut_off(tmp_path, name, kind):
    shutil.rmtree(tmp_path / "labels", ignore_errors=True)
    options = {"fields": {"field_names": ["a"]}, "boxes": {"choices": ["sign"]}}.get(kind, {})
    teacher = ScriptedTeacher(replies=[LONG_ANSWERS[name]] * 3)
    with serve(teacher) as suggest:
        session = open_photos(tmp_path, kind=kind, **options)
        reasons = suggest(session, boxes="pixels", max_new_tokens=4096)
    is_valid = name == "thoughts" and kind == "text"
    is_valid = is_valid or (name == "boxes" and kind != "boxes")
    assert (len(reasons), len(list_suggested(session))) == ((0, 1) if is_valid else (1, 0))
    assert all(len(reason) < 1000 for reason in reasons.values())
    assert (tmp_path / "labels" / TEACHER_FILE).stat().st_size < 200_000


def test_key_in_an_answer_is_neither_stored_nor_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    # Escaped in JSON, as some servers write it.
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
    text = f'{{"choices": [{{"message": {{"content": "the key {escaped}"}}}}]}}'
    teacher = ScriptedTeacher(replies=[Response(text, media_type="application/json")] * 3)
    with serve(teacher) as suggest:
        session = open_photos(tmp_path)
        assert suggest(session, concurrency=1) == {}
    content = [*list_suggested(session).values()]
    assert KEY not in str(content)
    assert "***" in str(content)
    assert KEY not in (tmp_path / "labels" / TEACHER_FILE).read_text()


def test_more_choices_than_requested_are_ignored(tmp_path):
    choices = [{"message": {"content": "red"}}] * 20_000
    teacher = ScriptedTeacher(replies=[JSONResponse({"choices": choices})])
    with serve(teacher) as suggest:
        session = open_photos(tmp_path)
        assert suggest(session) == {}
    assert (tmp_path / "labels" / TEACHER_FILE).read_text().count("red") == 3


class WaitingTeacher(ScriptedTeacher):
    """Server that interrupts the command at its second request, and then never answers."""

    ended = threading.Event()

    async def complete(self, request: Request) -> Response:
        self.requests.append(await request.json())
        if len(self.requests) == 2:
            await asyncio.sleep(0.5)  # until the command waits
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.to_thread(self.ended.wait)
        return Response()


def test_an_interrupt_waits_for_no_request(tmp_path: Path) -> None:
    # A shell ignores the signal in its background jobs.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with serve(teacher := WaitingTeacher()) as suggest:
        try:
            with pytest.raises(KeyboardInterrupt):
                suggest(open_photos(tmp_path, 3), concurrency=2)
        finally:
            teacher.ended.set()
            signal.signal(signal.SIGINT, previous)
    assert len(teacher.requests) == 2
