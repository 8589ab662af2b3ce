"""The page: what is on it, and what happens when something is pressed."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from finesight.errors import UserError
from finesight.infer.request import Options, Sampling
from finesight.infer.talk import Reply, Turn
from finesight.web.events import ASKED, ASKED_AGAIN, NOTHING, Inputs
from finesight.web.limits import LONGEST_ANSWER, MOST_TEMPERATURE, QUESTION_CHARACTERS
from finesight.web.show import (
    export_html,
    notice_html,
    title_html,
    turns_html,
    welcome_html,
)
from finesight.web.visitors import Visitor, Visitors
from finesight.web.words import ENGLISH, other_than, preferred

BASE = "base"
SECONDS = 0.08
"""Between two looks at an answer that grows: more often is not seen, and fills the network."""

READERS = 4
"""Threads that open pictures: each may hold one of the largest size, decoded."""

IDLE: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
RUNNING: dict[str, Any] = {"submit_btn": False, "stop_btn": True}

Updates = dict[Any, Any]


class Page:
    """The page's parts, and the events between them; a visitor is known by Gradio's session."""

    def __init__(self, visitors: Visitors) -> None:
        self._visitors, self._names = visitors, visitors.service.names
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="finesight-web")
        self._compares = BASE in self._names[1:]
        with gr.Blocks(title="finesight", analytics_enabled=False, fill_width=True) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        words = ENGLISH
        with gr.Row(elem_id="head"):
            self._title = _html("title")
            self._language = gr.Button(words.other, elem_id="language", size="sm")
        with gr.Column(elem_id="talk"):
            self._past = _html("past")
            self._now = _html("now")
            self._notice = _html("notice")
        with gr.Column(elem_id="below"):
            with gr.Row(elem_id="tools"):
                self._again = gr.Button(words.again, size="sm", interactive=False)
                self._undo = gr.Button(words.undo, size="sm", interactive=False)
                self._new = gr.Button(words.new, size="sm", interactive=False)
                self._export = _html("export")
            self._composer = gr.MultimodalTextbox(
                label=words.ask,
                show_label=False,
                placeholder=words.hint,
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=QUESTION_CHARACTERS,
                max_lines=8,
                elem_id="composer",
            )
            with gr.Row(elem_id="choices"):
                self._compare = gr.Checkbox(
                    label=words.compare, elem_id="compare", visible=self._compares
                )
            with gr.Accordion(words.settings, open=False, elem_id="settings") as self._settings:
                self._longest = gr.Slider(
                    1, LONGEST_ANSWER, 512, step=1, label=words.longest, elem_id="longest"
                )
                self._temperature = gr.Slider(
                    0.0, MOST_TEMPERATURE, 0.0, step=0.05, label=words.temperature,
                    info=words.greedy, elem_id="temperature",
                )  # fmt: skip

    def _connect(self) -> None:
        chosen = [self._compare, self._longest, self._temperature]
        labelled = [
            *(self._language, self._again, self._undo, self._new, self._export),
            *(self._composer, self._compare, self._settings, self._longest, self._temperature),
        ]
        told = [self._past, self._now, self._notice, *labelled]
        common: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        event = common | {"outputs": told}
        self.blocks.unload(self._left)
        plain = [
            self.blocks.load(self._entered, outputs=[self._title, *told], **common),
            self._composer.stop(self._stopped, **common),
            self._undo.click(self._undone, **event),
            self._new.click(self._begun_anew, **event),
            self._language.click(self._switched, **event),
        ]
        asked = self._composer.submit(self._asked, [self._composer, *chosen], **event)
        again = self._again.click(self._asked_again, chosen, **event)
        self.inputs: dict[int, Inputs] = {one["id"]: NOTHING for one in plain}
        """The types of the data of each event that a browser may send, by its number."""
        self.inputs |= {asked["id"]: ASKED, again["id"]: ASKED_AGAIN}

    def _visitor(self, request: gr.Request) -> Visitor:
        return self._visitors.of(str(request.session_hash))

    def _entered(self, request: gr.Request) -> Updates:
        visitor = self._visitor(request)
        visitor.words = preferred(request.headers.get("accept-language", ""))
        title = {self._title: title_html(self._names[0])}
        return title | self._labels(visitor) | self._shown(visitor)

    def _left(self, request: gr.Request) -> None:
        self._visitors.leave(str(request.session_hash))

    def _switched(self, request: gr.Request) -> Updates:
        visitor = self._visitor(request)
        visitor.words = other_than(visitor.words)
        return self._labels(visitor) | self._shown(visitor)

    def _stopped(self, request: gr.Request) -> None:
        turns = self._visitor(request).talk.turns
        for reply in turns[-1].replies if turns else ():
            reply.cancel()

    def _undone(self, request: gr.Request) -> Updates:
        visitor = self._visitor(request)
        turn = visitor.talk.undo()
        if turn is None:
            return self._settled(visitor)
        visitor.forget(turn.pictures)
        said = gr.MultimodalTextbox(value={"text": turn.text, "files": []}, **IDLE)
        return self._settled(visitor) | {self._composer: said}

    def _begun_anew(self, request: gr.Request) -> Updates:
        visitor = self._visitor(request)
        while (turn := visitor.talk.undo()) is not None:
            visitor.forget(turn.pictures)
        return self._settled(visitor)

    async def _asked(
        self,
        message: dict[str, Any],
        compare: bool,
        longest: float,
        temperature: float,
        request: gr.Request,
    ) -> AsyncIterator[Updates]:
        visitor = self._visitor(request)
        text, uploads = str(message["text"] or ""), [Path(name) for name in message["files"]]

        def begin() -> Turn:
            pictures = visitor.take(text, uploads)
            try:
                return visitor.talk.ask(
                    text, pictures, self._options(compare, longest, temperature)
                )
            except BaseException:
                visitor.forget(pictures)
                raise

        async for updates in self._answered(visitor, begin, emptied={"value": None}):
            yield updates

    async def _asked_again(
        self, compare: bool, longest: float, temperature: float, request: gr.Request
    ) -> AsyncIterator[Updates]:
        visitor = self._visitor(request)

        def begin() -> Turn:
            return visitor.talk.again(self._options(compare, longest, temperature))

        async for updates in self._answered(visitor, begin, emptied={}):
            yield updates

    def _options(self, compare: bool, longest: float, temperature: float) -> list[Options]:
        options = Options(
            max_new_tokens=int(min(longest, LONGEST_ANSWER)),
            sampling=Sampling(temperature=temperature),
        )
        names = (None, BASE) if compare and self._compares else (None,)
        return [replace(options, model=name) for name in names]

    async def _answered(
        self, visitor: Visitor, begin: Callable[[], Turn], emptied: Mapping[str, Any]
    ) -> AsyncIterator[Updates]:
        """The page while an answer grows, and after it."""
        begun = asyncio.ensure_future(
            asyncio.get_running_loop().run_in_executor(self._readers, begin)
        )
        try:
            # The thread goes on when the visitor has gone: nobody waits for its answer then.
            turn = await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_give_up)
            raise
        except UserError as error:
            yield {self._notice: _refused(visitor, error)}
            return
        number = len(visitor.talk.turns) - 1
        yield {
            self._past: turns_html(visitor, visitor.talk.turns[:-1]),
            self._now: turns_html(visitor, [turn], number),
            self._notice: "",
            self._composer: gr.MultimodalTextbox(**emptied, **RUNNING),
            **dict.fromkeys((self._again, self._undo, self._new), gr.Button(interactive=False)),
        }
        waiting = {asyncio.create_task(_drained(reply)) for reply in turn.replies}
        notice = ""
        try:
            while waiting:
                ended, waiting = await asyncio.wait(waiting, timeout=SECONDS)
                for task in ended:
                    notice = notice or _failure(visitor, task.exception())
                yield {self._now: turns_html(visitor, [turn], number)}
        finally:
            for reply in turn.replies:
                reply.cancel()
        yield self._settled(visitor) | {self._notice: notice}

    def _settled(self, visitor: Visitor) -> Updates:
        """The page when nothing grows."""
        asked = gr.Button(interactive=bool(visitor.talk.turns))
        return {
            **self._shown(visitor),
            self._notice: "",
            self._composer: gr.MultimodalTextbox(**IDLE),
            **dict.fromkeys((self._again, self._undo, self._new), asked),
        }

    def _shown(self, visitor: Visitor) -> Updates:
        turns = visitor.talk.turns
        return {
            self._past: turns_html(visitor, turns) if turns else welcome_html(visitor),
            self._now: "",
            self._export: export_html(visitor),
        }

    def _labels(self, visitor: Visitor) -> Updates:
        words = visitor.words
        return {
            self._language: gr.Button(words.other),
            self._again: gr.Button(words.again),
            self._undo: gr.Button(words.undo),
            self._new: gr.Button(words.new),
            self._composer: gr.MultimodalTextbox(label=words.ask, placeholder=words.hint),
            self._compare: gr.Checkbox(label=words.compare),
            self._settings: gr.Accordion(words.settings),
            self._longest: gr.Slider(label=words.longest),
            self._temperature: gr.Slider(label=words.temperature, info=words.greedy),
        }


def _html(name: str) -> gr.HTML:
    return gr.HTML("", elem_id=name, js_on_load=None, apply_default_css=False)


def _give_up(begun: asyncio.Future[Turn]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        for reply in begun.result().replies:
            reply.cancel()


async def _drained(reply: Reply) -> None:
    async for _ in reply:
        pass


def _refused(visitor: Visitor, error: UserError) -> str:
    return notice_html(visitor.words.refused, str(error))


def _failure(visitor: Visitor, error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, UserError):
        return _refused(visitor, error)
    traceback.print_exception(error)
    return notice_html(visitor.words.refused, visitor.words.failed)
