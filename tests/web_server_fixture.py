"""Chat page on loopback in a thread, with a scripted model."""

import asyncio
import atexit
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from browser import DESKTOP_WIDTH, Browser

from finesight.app.chat_page import make_chat_app
from finesight.app.server import Access, AccessMiddleware, PageServer
from finesight.errors import UserError
from finesight.files.storage import temporary_folder
from finesight.files.worker_pool import WorkerPool
from finesight.infer.prediction import Prediction
from finesight.infer.request import CompletionDelta, FinishReason, GenerationOptions
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.samples.sample import BoxPart, ImagePart, LocatedSample, Sample
from finesight.serve.http_protocol import bind_socket
from finesight.settings.manifest import Manifest
from finesight.vision.image_reader import create_image_pool

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
        parts, text = self.located.sample.iter_parts(), self.generated_text
        images = tuple(Path(part.image) for part in parts if isinstance(part, ImagePart))
        return Prediction("", images, "", text, text, self.boxes, 1, "stop")


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
    prompt_format: PromptFormat = DEFAULT_PROMPT_FORMAT
    requests: list[GenerationOptions] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def get_prompt_format(self, model: str | None = None) -> PromptFormat:
        return self.prompt_format

    def submit(
        self,
        located_sample: LocatedSample,
        options: GenerationOptions,
        *,
        image_index: int | None = None,
    ) -> ScriptedGeneration:
        self.requests.append(options)
        self.samples.append(located_sample.sample)
        questions = [m for m in located_sample.sample.messages if m.role == "user"]
        text = "".join(getattr(part, "text", "") for part in questions[-1].content)
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
    """URL and private folder of a running page."""

    address: str
    port: int
    folder: Path
    app: AccessMiddleware


@contextmanager
def run_app(
    app: Any, listener: socket.socket | None = None, proxies: Sequence[str] = ()
) -> Iterator[int]:
    """Run an application in a thread within the block. Yields its port."""
    with listener or bind_socket("127.0.0.1", 0) as bound:
        server = PageServer(app, None, proxies)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server has ended"
                time.sleep(0.02)
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def run_web_page(
    service: object,
    password: str | None = None,
    loopback: bool = True,
    proxies: Sequence[str] = (),
    pool: WorkerPool | None = None,
) -> Iterator[RunningWebPage]:
    """Run the page within the block."""
    with bind_socket("127.0.0.1", 0) as listener, temporary_folder("web") as folder:
        port = listener.getsockname()[1]
        access = Access(password, loopback, f"finesight-chat-{port}")
        arguments: Any = service, folder, pool or get_image_pool(), access
        app = make_chat_app(*arguments)
        with run_app(app, listener, proxies):
            yield RunningWebPage(f"http://127.0.0.1:{port}/", port, folder, app)


class ChatPageDriver:
    """Chat page in a browser with a width and language."""

    def __init__(
        self, browser: Browser, address: str, width: int = DESKTOP_WIDTH, language: str = "en-GB,en"
    ) -> None:
        self.browser, self.driver = browser, browser.driver
        self.wait_for_script, self.click = browser.wait_for, browser.click
        self.read_texts = browser.read_texts
        send_command = self.driver.execute_cdp_cmd
        send_command("Network.enable", {})
        # The conversations belong to a cookie.
        everything = {"origin": address.rstrip("/"), "storageTypes": "all"}
        send_command("Storage.clearDataForOrigin", everything)
        send_command("Network.setExtraHTTPHeaders", {"headers": {"Accept-Language": language}})
        browser.visit(address, width)
        self.wait_for_script("return !!document.querySelector('h1 span, .sign-in');")

    def attach_images(self, images: Sequence[Path]) -> None:
        """Attach images to the next question."""
        self.choose_files(images)
        count = "document.querySelectorAll('#attachments li').length"
        self.wait_for_script(f"{count} === {len(images)}")

    def choose_files(self, files: Sequence[Path]) -> None:
        if files:
            field = self.driver.find_element("css selector", "#files")
            field.send_keys("\n".join(map(str, files)))

    def ask(self, text: str, images: Sequence[Path] = ()) -> None:
        """Submit a question and wait for the answer."""
        turns = self.count_turns()
        self.submit(text, images)
        self.wait_for_script(f"return document.querySelectorAll('.turn').length === {turns + 1};")
        self.wait_until_idle()

    def submit(self, text: str, images: Sequence[Path] = ()) -> None:
        """Submit a question without waiting."""
        if images:
            self.attach_images(images)
        self.driver.execute_script(
            "arguments[0].focus(); document.execCommand('insertText', false, arguments[1]);",
            self.driver.find_element("css selector", "#question"),
            text,
        )
        self.click("#send")

    def wait_until_idle(self) -> None:
        """Wait until generation is complete."""
        self.wait_for_script(
            "return !document.querySelector('.streaming')"
            " && !document.querySelector('#send').hidden;"
        )

    def click_button(self, words: str) -> None:
        found = (
            "[...document.querySelectorAll('#tools button, #head button')]"
            f".find(at => at.textContent.trim() === {words!r} && !at.disabled)"
        )
        self.wait_for_script(f"return !!{found};")
        self.browser.run(f"{found}.click();")

    def count_turns(self) -> int:
        """Return the number of displayed turns."""
        return self.browser.count(".turn")
