"""ML backend of Label Studio: protocol, questions, results and sources of images."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_server_fixtures import (
    CHAT,
    KEY,
    LIMITS,
    POST_CHAT,
    RunningServer,
    make_auth_header,
    make_data_url,
    run_server,
    send_request,
    wait_until_idle,
)
from case_files import load_cases
from fake_hub_servers import FakeHubServer, HubHandler, run_in_thread

from finesight.errors import UserError
from finesight.infer.model_loader import InferenceModel
from finesight.infer.prediction import Prediction
from finesight.ingest.formats.label_studio import LabelControl
from finesight.samples.sample import BoxPart, create_region
from finesight.serve.api_schema import ApiError, ServerLimits
from finesight.serve.chat_completions import ChoiceBuilder
from finesight.serve.label_studio_backend import LabelStudioOptions, build_results
from finesight.serve.media_sources import LabelStudioImages, MediaFetcher

IMAGE_TAG = '<Image name="img" value="$photo"/>'
BOXES = '<RectangleLabels name="box" toName="img"><Label value="shape"/></RectangleLabels>'
CHOICES = """<Choices name="kind" toName="img" choice="multiple"><Choice value="cat"/>
<Choice value="dog" alias="hound"/></Choices>"""
TEXT = '<TextArea name="note" toName="img"/>'
PROMPT = "Locate every shape and name it."


@pytest.fixture(scope="module")
def backend(
    inference_model: InferenceModel, scenes: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    images = LabelStudioImages(scenes[0].parent, None, None, LIMITS)
    folder = tmp_path_factory.mktemp("backend")
    options = LabelStudioOptions(images, PROMPT)
    with run_server(inference_model, folder, keys=[KEY], label_studio=options) as there:
        yield there


def post(
    server: RunningServer, path: str, body: Any, header: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    headers = make_auth_header(KEY) if header is None else header
    status, output, _ = send_request(
        server, "POST", f"/label-studio/{path}", json.dumps(body), headers
    )
    return status, output


def predict(server: RunningServer, config: str, *images: str) -> tuple[int, dict[str, Any]]:
    tasks = [{"id": number, "data": {"photo": image}} for number, image in enumerate(images)]
    view = f"<View>{IMAGE_TAG}{config}</View>"
    return post(server, "predict", {"tasks": tasks, "label_config": view, "project": "1.2"})


def test_boxes_are_in_percent_of_the_image(backend: RunningServer, scenes: list[Path]) -> None:
    references = [f"/data/local-files/?d={scenes[0].name}", scenes[1].name]
    references.append(make_data_url(scenes[0].read_bytes()))
    status, output = predict(backend, BOXES, *references)
    assert status == 200
    first, second, same = output["results"]
    assert first["result"] == same["result"] != second["result"]
    assert first["model_version"] == backend.service.model_names[0]
    assert 0 < first["score"] <= 1
    (result, *_) = first["result"]
    assert (result["from_name"], result["to_name"]) == ("box", "img")
    assert result["value"]["rectanglelabels"] == ["shape"]
    assert result["value"]["x"] + result["value"]["width"] <= 100
    assert len({one["id"] for one in first["result"]}) == len(first["result"])


def test_tasks_without_image_have_no_result(backend: RunningServer, scenes: list[Path]) -> None:
    outside = "../" * 20 + "etc/hostname"
    references = [
        scenes[0].name,
        "missing.png",
        f"/data/local-files/?d={outside}",
        outside,
        str(scenes[0]),
        "http://127.0.0.1:9/a.png",
        "data:text/plain,x",
    ]
    status, output = predict(backend, TEXT, *references)
    assert status == 200
    first, *others = output["results"]
    assert first["result"][0]["type"] == "textarea"
    assert [one.keys() for one in others] == [{"error"}] * 6
    assert "image 'missing.png'" in others[0]["error"]
    assert "--allow-media-host" in others[4]["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tasks": [], "label_config": "<View/>"}, "no control for images"),
        ({"tasks": []}, "no control for images"),
        ({"tasks": [], "label_config": "<View>"}, "broken XML"),
        ({"tasks": [], "label_config": "<!DOCTYPE x><View/>"}, "a DOCTYPE"),
        ([], "no control for images"),
    ],
)
def test_invalid_requests(backend: RunningServer, body: Any, message: str) -> None:
    status, output = post(backend, "predict", body)
    assert (status, message in output["error"]["message"]) == (400, True)


def test_other_requests_of_the_protocol(backend: RunningServer, server: RunningServer) -> None:
    name, headers = backend.service.model_names[0], make_auth_header(KEY)
    for path, content in (
        ("health", {"status": "UP", "model_class": name}),
        ("versions", {"versions": [name]}),
    ):
        answer = send_request(backend, "GET", f"/label-studio/{path}", headers=headers)
        assert answer[:2] == (200, content)
    assert post(backend, "setup", {"access_token": "x"}) == (200, {"model_version": name})
    assert post(backend, "webhook", {"action": "ANNOTATION_CREATED"}) == (200, {})
    status, output = post(backend, "webhook", {"action": "START_TRAINING"})
    assert (status, "train with them" in output["error"]["message"]) == (400, True)
    assert post(server, "setup", {})[0] == 404


def test_key_as_password(backend: RunningServer) -> None:
    def basic(text: str) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    assert post(backend, "setup", {}, basic(f"anyone:{KEY}"))[0] == 200
    for header in (basic(f"anyone:{KEY}x"), basic(KEY), {"Authorization": "Basic %"}, {}):
        assert post(backend, "setup", {}, header)[0] == 401
    assert send_request(backend, "GET", "/v1/models", headers=basic(f"anyone:{KEY}"))[0] == 401


def make_choice(answer: str, boxes: tuple[BoxPart, ...] = ()) -> ChoiceBuilder:
    prediction = Prediction("request", (), "?", answer, answer, boxes, 1, "stop")
    return ChoiceBuilder(0, None, False, None, prediction=prediction)  # type: ignore[arg-type]


def test_points_are_in_percent_of_the_image() -> None:
    control = LabelControl("points", "a", "i", "d", ("dog", "cat"))
    parts = [create_region(xyxy, "Dog", is_point=True) for xyxy in ((10, 5) * 2, (99, 5) * 2)]
    parts.append(BoxPart(label="cat", xyxy=(0, 0, 20, 20)))
    first, second = build_results(control, make_choice("", tuple(parts)), (20, 40))
    assert first["type"] == "keypointlabels"
    assert first["value"] == {"x": 25, "y": 25, "width": 0.5, "keypointlabels": ["dog"]}
    assert (second["value"]["x"], second["value"]["keypointlabels"]) == (25, ["cat"])


@pytest.mark.parametrize(
    ("control", "answer", "value"),
    [
        (LabelControl("text", "a", "i", "d"), " A dog. ", {"text": ["A dog."]}),
        (LabelControl("choices", "a", "i", "d", ("cat", "Dog")), "dog", {"choices": ["Dog"]}),
        (LabelControl("choices", "a", "i", "d", ("cat", "dog")), "dog, cat", None),
        (
            LabelControl("choices", "a", "i", "d", ("cat", "dog"), is_multiple=True),
            "dog, cat, cow",
            {"choices": ["dog", "cat"]},
        ),
    ],
)
def test_answers_of_controls(control: LabelControl, answer: str, value: Any) -> None:
    results = build_results(control, make_choice(answer), (20, 40))
    assert [result["value"] for result in results] == ([] if value is None else [value])


def test_labels_of_boxes() -> None:
    boxes = (
        BoxPart(image=0, label="DOG", xyxy=(-4, 5, 20, 10)),
        BoxPart(image=0, label="cow", xyxy=(1, 5, 20, 10)),
        BoxPart(image=0, label="cat", xyxy=(50, 5, 60, 10)),
    )
    control = LabelControl("boxes", "box", "img", "photo", ("cat", "dog"))
    (result,) = build_results(control, make_choice("", boxes), (20, 40))
    assert result["value"]["rectanglelabels"] == ["dog"]
    assert [result["value"][key] for key in ("x", "y", "width", "height")] == [0, 25, 50, 25]
    control = LabelControl("boxes", "box", "img", "photo", ("word",), text_name="text")
    results = build_results(control, make_choice("", boxes), (20, 40))
    assert [result["value"].get("text") for result in results] == [None, ["DOG"], None, ["cow"]]
    assert results[0]["id"] == results[1]["id"]


TOKENS = {"0123456789abcdef": "Token 0123456789abcdef", "a.personal.token": "Bearer short-lived"}


@pytest.fixture
def label_studio() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Run a server with an image, a redirect and a token exchange. Returns address and requests."""
    requests: list[tuple[str, str | None]] = []

    class Handler(HubHandler):
        def respond(self, path: str, query: dict[str, list[str]]) -> None:
            requests.append((path, self.headers["Authorization"]))
            status = {"/data/moved.png": 302, "/data/upload/1/a.png": 200}.get(path, 404)
            self.send(status, b"pixels", {"Location": "http://127.0.0.1:9/"})

        def receive(self, path: str, body: bytes) -> None:
            requests.append((path, json.loads(body)["refresh"]))
            self.send(200, b'{"access": "short-lived"}')

    with run_in_thread(FakeHubServer(Handler)) as server:
        yield server.url, requests


@pytest.mark.parametrize("token", [None, *TOKENS])
def test_images_of_the_named_server(
    label_studio: tuple[str, list[tuple[str, str | None]]],
    token: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, requests = label_studio
    caplog.set_level(logging.DEBUG)
    images = LabelStudioImages(None, f"{url}/", token, LIMITS)
    for reference in ("/data/upload/1/a.png", f"{url}/data/upload/1/a.png"):
        assert fetch_image(images, reference) == b"pixels"
    sent = [value for path, value in requests if path.startswith("/data")]
    assert sent == [TOKENS.get(token or "")] * 2
    for reference in ("/data/moved.png", "/data/none.png"):
        with pytest.raises(ApiError, match="could not be loaded from the Label Studio server"):
            fetch_image(images, reference)
    with pytest.raises(UserError, match="--allow-media-host"):
        fetch_image(images, "http://127.0.0.1:9/data/upload/1/a.png")
    assert token is None or token not in caplog.text
    assert "short-lived" not in caplog.text


def test_endless_answer_to_a_token_is_refused() -> None:
    sent = list[int]()

    class Handler(HubHandler):
        def receive(self, path: str, body: bytes) -> None:
            self.send_head(200, {})
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(b" " * 65_536)
                    sent.append(65_536)

    with run_in_thread(FakeHubServer(Handler)) as server:
        images = LabelStudioImages(None, server.url, "a.personal.token", LIMITS)
        with pytest.raises(ApiError, match="ResponseLimitError"):
            fetch_image(images, "/data/upload/1/a.png")
    assert sum(sent) < 50 << 20


def fetch_image(images: LabelStudioImages, reference: str) -> bytes:
    file = io.BytesIO()
    asyncio.run(images.fetch(reference, file, web=MediaFetcher((), ServerLimits())))
    return file.getvalue()


def test_token_is_sent_for_data_paths_only(
    label_studio: tuple[str, list[tuple[str, str | None]]],
) -> None:
    url, requests = label_studio
    images = LabelStudioImages(None, url, "0123456789abcdef", LIMITS)
    cases = load_cases("label_studio")
    dotted = [path.replace("{}", dots) for path in cases["paths"] for dots in cases["dots"]]
    references = [*dotted, *cases["other"]]
    for reference in (*references, *(url + path for path in references if path[:1] == "/")):
        with pytest.raises(ApiError, match="no image"):
            fetch_image(images, reference)
    assert requests == []


def test_predictions_are_limited(
    inference_model: InferenceModel,
    scenes: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The limits apply to one request and to all of them, and a disconnect cancels the answers."""
    images = LabelStudioImages(scenes[0].parent, None, None, LIMITS)
    name, limits = scenes[0].name, replace(LIMITS, max_label_studio_answers=400)
    options: dict[str, Any] = {"label_studio": LabelStudioOptions(images)}
    short = replace(limits, timeout=0.5)
    with run_server(inference_model, tmp_path, limits=short, **options) as there:
        status, output = predict(there, TEXT * 300, *[name] * 300)
        assert (status, "300 tasks with 300 controls" in output["error"]["message"]) == (400, True)
        assert predict(there, TEXT, *[name] * 400)[0] == 504
    view = f"<View>{IMAGE_TAG}{TEXT}</View>"
    tasks = [{"data": {"photo": name}}] * 400
    body = json.dumps({"tasks": tasks, "label_config": view}).encode()
    head = POST_CHAT.replace(CHAT.encode(), b"/label-studio/predict")
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    (tmp_path / "other").mkdir()
    with run_server(inference_model, tmp_path / "other", limits=limits, **options) as there:
        with there.connect(head + body):
            while not there.service.get_stats().num_running:
                time.sleep(0.01)
            assert predict(there, TEXT, name)[0] == 429
        while predict(there, TEXT, name)[0] == 429:
            time.sleep(0.05)
        wait_until_idle(there)
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "build",
    [
        lambda: LabelStudioImages(None, "localhost:8080", None, LIMITS),
        lambda: LabelStudioImages(None, "file:///etc", None, LIMITS),
        lambda: LabelStudioOptions(LabelStudioImages(None, None, None, LIMITS), "Find {this}."),
    ],
)
def test_invalid_options(build: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"is not the address|unknown placeholder"):
        build()
