"""The page served on loopback, in a thread, and a model that says what it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, TextPart
from finesight.errors import UserError
from finesight.infer.predict import Prediction
from finesight.infer.request import Delta, Finish, Options
from finesight.web.guard import Guard
from finesight.web.server import UPLOADS, listening, make_app, private_folder, visitors_in
from finesight.web.visitors import Visitors

Answer = Callable[[str], tuple[str, tuple[BoxPart, ...]]]
"""What is said to a question, and the boxes in it."""


@dataclass
class Told:
    """An answer that is known beforehand, said once, or again and again until it is stopped."""

    located: Located
    text: str
    boxes: tuple[BoxPart, ...]
    endless: bool
    said: str = ""
    finish: Finish | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self.finish is None:
            self.said += self.text
            yield Delta(self.text, ())
            if not self.endless:
                self.finish = "stop"
            await asyncio.sleep(0.02)

    def cancel(self) -> None:
        self.finish = "cancelled"

    def prediction(self) -> Prediction:
        pictures = [p for p in self.located.sample.parts() if isinstance(p, ImagePart)]
        images = tuple(Path(part.image) for part in pictures)
        return Prediction("", images, "", self.said, self.said, self.boxes, 1, True)


@dataclass
class Parrot:
    """In a service's place: says to each question what `answer` makes of it."""

    answer: Answer
    names: tuple[str, ...] = ("parrot", "base")
    endless: bool = False
    asked: list[Options] = field(default_factory=list)

    def ask(self, located: Located, options: Options) -> Told:
        self.asked.append(options)
        questions = [m for m in located.sample.messages if m.role == "user"]
        parts = questions[-1].content
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        if text == "refuse":
            raise UserError("<b>refused</b>", where="parrot", expected="another", remedy="ask it")
        return Told(located, *self.answer(text), self.endless)


@dataclass(frozen=True)
class Served:
    """Where the page is, and who is on it."""

    address: str
    port: int
    visitors: Visitors
    folder: Path
    app: Guard


@contextmanager
def served(service: object, password: str | None = None, loopback: bool = True) -> Iterator[Served]:
    """The page, for the length of the block."""
    with listening("127.0.0.1", 0) as listener, private_folder() as folder:
        visitors = visitors_in(folder, service)  # type: ignore[arg-type]
        app = make_app(visitors, folder / UPLOADS, password, loopback)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server has ended"
                time.sleep(0.02)
            port = listener.getsockname()[1]
            yield Served(f"http://127.0.0.1:{port}/", port, visitors, folder, app)
        finally:
            server.should_exit = True
            thread.join()
