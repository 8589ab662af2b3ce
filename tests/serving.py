"""A server on this machine, with the model that comes in the package behind it."""

from __future__ import annotations

import atexit
import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI
from PIL import Image

from finesight.encode.render import Renderer
from finesight.infer.load import Answerer
from finesight.infer.service import Facts, Service
from finesight.model.network import VisionLanguageModel
from finesight.serve.app import make_app
from finesight.serve.fetch import Fetcher
from finesight.serve.formats import IMAGE_FORMATS
from finesight.serve.guard import Guard
from finesight.serve.limits import Limits
from finesight.serve.run import Server, listen, make_workers
from finesight.worker_pool import WorkerPool

LIMITS = Limits(rows=8, waiting=64)


@dataclass(frozen=True)
class Running:
    """A server that answers on loopback."""

    port: int
    service: Service
    app: Guard
    server: Server
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none needed", **given: Any) -> OpenAI:
        """The official client; it asks once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **given)


def service_of(answerer: Answerer, limits: Limits = LIMITS) -> Service:
    """A service with a small cache."""
    return Service(answerer, rows=limits.rows, waiting=limits.waiting, cache_bytes=1 << 26)


@cache
def workers_of(renderer: Renderer, vocabulary: int) -> WorkerPool:
    """Worker processes, shared by all servers of a test process."""
    workers = make_workers(renderer, vocabulary, LIMITS)
    workers.start()
    atexit.register(workers.close)
    return workers


@contextlib.contextmanager
def running(
    answerer: Answerer,
    folder: Path,
    *,
    keys: Sequence[str] = (),
    limits: Limits = LIMITS,
    fetcher: Fetcher | None = None,
    formats: Sequence[str] = IMAGE_FORMATS,
) -> Iterator[Running]:
    """A real server in a thread of its own, stopped at the end."""
    service = service_of(answerer, limits)
    assert isinstance(answerer.renderer, Renderer)
    assert isinstance(answerer.model, VisionLanguageModel)
    vocabulary = answerer.model.geometry.language.vocabulary
    app = make_app(
        service,
        workers_of(answerer.renderer, vocabulary),
        vocabulary,
        folder,
        keys=keys,
        limits=limits,
        fetcher=fetcher,
        formats=formats,
    )
    place = listen("127.0.0.1", 0, keys)
    ready = threading.Event()
    server = Server(app, replace(limits, closing_seconds=10.0), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    assert ready.wait(30), "the server has not begun to listen"
    try:
        yield Running(place.getsockname()[1], service, app, server, folder)
    finally:
        server.should_exit = True
        thread.join(30)
        service.close(finish=False)


def png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """A small picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image(url: str) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*parts: str | dict[str, Any]) -> list[Any]:
    """Messages of one turn of the user: texts and parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


KEY = "first-key-0123456789"
QUESTION = "What is in the picture?"
ENDLESS: dict[str, Any] = {
    "max_tokens": 2000,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "numbers",
            "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 9999},
        },
    },
}
"""A question whose answer does not end by itself."""


def idle(server: Running, seconds: float = 20.0) -> Facts:
    """Wait until nothing is answered; how the service is doing then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        facts = server.service.facts()
        if not facts.running and not facts.waiting:
            return facts
        time.sleep(0.02)
    raise AssertionError(f"still busy after {seconds} seconds: {server.service.facts()}")


def send(
    server: Running,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    chunked: bool = False,
) -> tuple[int, dict[str, Any], http.client.HTTPResponse]:
    """Status, JSON and the answer itself of a request as it is, without a client's help."""
    there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(there):
        given = {"Content-Type": "application/json", **(headers or {})}
        there.request(method, path, body, given, encode_chunked=chunked)
        answer = there.getresponse()
        content = answer.read()
    kind = answer.headers.get("content-type", "")
    return answer.status, json.loads(content) if "json" in kind else {}, answer


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def question(server: Running, *parts: Any, **given: Any) -> str:
    """The body of a question."""
    body = {"model": server.service.names[0], "messages": asked(*parts), "max_tokens": 4, **given}
    return json.dumps(body)
