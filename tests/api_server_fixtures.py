"""Local API server with the bundled model."""

import atexit
import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hostile_requests import make_schema_format, make_video_content
from image_fixtures import encode_image, make_noise_image
from openai import OpenAI

from finesight.encode.renderer import NativeRenderer
from finesight.files.worker_pool import WorkerPool
from finesight.infer.inference_service import InferenceService, ServiceStats
from finesight.infer.model_loader import InferenceModel
from finesight.model.vlm import VisionLanguageModel
from finesight.serve.api_schema import ServerLimits
from finesight.serve.api_server import ApiServer, create_worker_pool, make_app
from finesight.serve.http_protocol import bind_socket
from finesight.serve.request_middleware import RequestMiddleware

CHAT = "/v1/chat/completions"
POST_CHAT = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
"""Start of a raw request."""

LIMITS = ServerLimits(max_num_seqs=8, max_queue=64, shutdown_timeout_s=10.0)


@dataclass(frozen=True)
class RunningServer:
    """Running server on loopback."""

    port: int
    service: InferenceService
    app: RequestMiddleware
    server: ApiServer
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none needed", **given: Any) -> OpenAI:
        """Return an OpenAI client without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **given)

    def connect(self, data: bytes = b"", timeout: float = 60.0) -> socket.socket:
        """Open a connection and send data."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.sendall(data)
        return connection


@cache
def get_worker_pool(renderer: NativeRenderer, vocabulary: int) -> WorkerPool:
    """Return worker processes shared by all servers of the test process."""
    workers = create_worker_pool(renderer, vocabulary, LIMITS)
    workers.start()
    atexit.register(workers.close)
    return workers


@contextlib.contextmanager
def run_server(
    inference_model: InferenceModel,
    folder: Path,
    *,
    keys: Sequence[str] = (),
    limits: ServerLimits = LIMITS,
    **options: Any,
) -> Iterator[RunningServer]:
    """Run a server with options of `make_app` in a thread within the block."""
    sizes = {"max_num_seqs": limits.max_num_seqs, "max_waiting": limits.max_queue}
    service = InferenceService(inference_model, kv_cache_bytes=1 << 26, **sizes)
    assert isinstance(inference_model.renderer, NativeRenderer)
    assert isinstance(inference_model.model, VisionLanguageModel)
    vocabulary = inference_model.model.config.decoder.vocab_size
    workers = get_worker_pool(inference_model.renderer, vocabulary)
    options |= {"api_keys": keys, "limits": limits}
    app = make_app(service, workers, vocabulary, folder, **options)
    listener = bind_socket("127.0.0.1", 0)
    ready = threading.Event()
    server = ApiServer(app, limits, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(30), "the server has not begun to listen"
    try:
        yield RunningServer(listener.getsockname()[1], service, app, server, folder)
    finally:
        server.should_exit = True
        thread.join(30)
        service.close(wait_for_running=False)


def make_noise_png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """Make a small noise image."""
    return encode_image(make_noise_image(width, height, seed))


def make_data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def make_image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def make_video_part(data: bytes, **given: Any) -> dict[str, Any]:
    return make_video_content(data) | given


def make_messages(*parts: str | dict[str, Any]) -> list[Any]:
    """Make the messages of one user turn from texts and parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


KEY = "first-key-0123456789"
PROMPT = "What is in the picture?"
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 9999}
ENDLESS_REQUEST = {"max_tokens": 2000, "response_format": make_schema_format(NUMBERS)}
"""Request whose answer does not end by itself."""


def wait_until_idle(server: RunningServer, seconds: float = 20.0) -> ServiceStats:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        facts = server.service.get_stats()
        if not facts.num_running and not facts.num_waiting:
            return facts
        time.sleep(0.02)
    raise AssertionError(f"still busy after {seconds} seconds: {server.service.get_stats()}")


def send_request(
    server: RunningServer,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    chunked: bool = False,
) -> tuple[int, dict[str, Any], http.client.HTTPResponse]:
    """Send a raw request. Returns status, JSON and the response."""
    there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(there):
        given = {"Content-Type": "application/json", **(headers or {})}
        there.request(method, path, body, given, encode_chunked=chunked)
        answer = there.getresponse()
        content = answer.read()
    kind = answer.headers.get("content-type", "")
    return answer.status, json.loads(content) if content and "json" in kind else {}, answer


def make_auth_header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def make_request_body(server: RunningServer, *parts: Any, **given: Any) -> str:
    body = {"model": server.service.model_names[0], "messages": make_messages(*parts)}
    return json.dumps(body | {"max_tokens": 4} | given)


def post_chat(
    server: RunningServer, *parts: Any, headers: dict[str, str] | None = None, **given: Any
) -> tuple[int, dict[str, Any]]:
    """Post a chat completion. Returns its status, and its error or its response."""
    body = make_request_body(server, *parts, **given)
    status, output, _ = send_request(server, "POST", CHAT, body, headers)
    return status, output.get("error", output)
