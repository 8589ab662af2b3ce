"""Chat page on loopback in a thread, with a scripted model."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import uvicorn

from finesight.app.access import Access, AccessMiddleware
from finesight.app.chat_page import make_chat_app
from finesight.app.chat_store import ChatStore
from finesight.app.server import bind_socket, create_server_config
from finesight.data.sample import BoxPart, ImagePart, LocatedSample, TextPart
from finesight.errors import UserError
from finesight.infer.prediction import Prediction
from finesight.infer.request import CompletionDelta, FinishReason, GenerationOptions
from finesight.manifest import Manifest
from finesight.storage import temporary_folder
from finesight.vision.image_reader import create_image_pool
from finesight.worker_pool import WorkerPool

AnswerFunction = Callable[[str], tuple[str, tuple[BoxPart, ...]]]
"""Returns the answer to a question, and its boxes."""


@dataclass
class ScriptedGeneration:
    """Generation with a fixed text, optionally repeated until canceled."""

    located: LocatedSample
    text: str
    boxes: tuple[BoxPart, ...]
    is_endless: bool
    generated_text: str = ""
    finish_reason: FinishReason | None = None

    async def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        while self.finish_reason is None:
            self.generated_text += self.text
            yield CompletionDelta(self.text, ())
            if not self.is_endless:
                self.finish_reason = "stop"
            await asyncio.sleep(0.02)

    def __iter__(self) -> Iterator[CompletionDelta]:
        self.generated_text, self.finish_reason = self.text, "stop"
        yield CompletionDelta(self.text, ())

    def cancel(self) -> None:
        self.finish_reason = "cancelled"

    def build_prediction(self) -> Prediction:
        image_parts = [p for p in self.located.sample.iter_parts() if isinstance(p, ImagePart)]
        images = tuple(Path(part.image) for part in image_parts)
        return Prediction(
            "", images, "", self.generated_text, self.generated_text, self.boxes, 1, "stop"
        )


@dataclass
class ScriptedService:
    """Fake inference service that answers with `answer`."""

    answer: AnswerFunction = lambda text: (text, ())
    model_names: tuple[str, ...] = ("parrot", "base")
    is_endless: bool = False
    default_thinking: bool | None = None
    system_prompt: str | None = "Answer."
    max_model_len: int = 2048
    manifest: Manifest | None = None
    requests: list[GenerationOptions] = field(default_factory=list)

    def submit(
        self,
        located_sample: LocatedSample,
        options: GenerationOptions,
        *,
        image_index: int | None = None,
    ) -> ScriptedGeneration:
        self.requests.append(options)
        questions = [m for m in located_sample.sample.messages if m.role == "user"]
        parts = questions[-1].content
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        if text == "refuse":
            raise UserError("<b>refused</b>", where="parrot", expected="another", remedy="ask it")
        return ScriptedGeneration(located_sample, *self.answer(text), self.is_endless)


@cache
def get_image_pool() -> WorkerPool:
    """Return worker processes for the images of all pages of the test process."""
    pool = create_image_pool()
    atexit.register(pool.close)
    return pool


@dataclass(frozen=True)
class RunningWebPage:
    """URL and conversations of a running page."""

    address: str
    port: int
    store: ChatStore
    folder: Path
    app: AccessMiddleware


@contextmanager
def run_web_page(
    service: object,
    password: str | None = None,
    loopback: bool = True,
    proxies: Sequence[str] = (),
) -> Iterator[RunningWebPage]:
    """Run the page within the block."""
    with bind_socket("127.0.0.1", 0) as listener, temporary_folder("web") as folder:
        port = listener.getsockname()[1]
        store = ChatStore(service, folder, get_image_pool())  # type: ignore[arg-type]
        app = make_chat_app(store, Access(password, loopback, f"finesight-chat-{port}"))
        server = uvicorn.Server(create_server_config(app, proxies))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server has ended"
                time.sleep(0.02)
            yield RunningWebPage(f"http://127.0.0.1:{port}/", port, store, folder, app)
        finally:
            server.should_exit = True
            thread.join()
