"""Layout and event handlers of the chat page, built with Gradio."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.errors import UserError
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.web.access_middleware import EMPTY_INPUT, QUESTION_INPUT, REGENERATE_INPUT, Inputs
from finesight.web.chat_html import (
    ENGLISH,
    UiText,
    get_other_language,
    render_notice,
    render_turns,
    select_ui_text,
)
from finesight.web.web_sessions import (
    MAX_MESSAGE_CHARS,
    MAX_NEW_TOKENS,
    MAX_TEMPERATURE,
    WebSession,
    WebSessionStore,
)

BASE_MODEL_NAME = "base"
UPDATE_INTERVAL_S = 0.08
"""Seconds between updates of a streamed completion in the browser."""

NUM_READER_THREADS = 4
"""Number of threads that decode images. Each may hold one image of maximum size."""

IDLE_BUTTONS: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
RUNNING_BUTTONS: dict[str, Any] = {"submit_btn": False, "stop_btn": True}

ComponentUpdates = dict[Any, Any]


class ChatPage:
    """Gradio chat page for several users, who are identified by Gradio session IDs."""

    def __init__(self, session_store: WebSessionStore) -> None:
        self._session_store, self._model_names = session_store, session_store.service.model_names
        self._reader_pool = ThreadPoolExecutor(
            NUM_READER_THREADS, thread_name_prefix="finesight-web"
        )
        self._default_thinking = session_store.service.default_thinking
        self._can_compare = BASE_MODEL_NAME in self._model_names[1:]
        with gr.Blocks(title="finesight", analytics_enabled=False, fill_width=True) as self.blocks:
            self._build_layout()
            self._connect_events()

    def _build_layout(self) -> None:
        ui_text = ENGLISH
        with gr.Row(elem_id="head"):
            self._title_html = _create_html("title")
            self._language_button = gr.Button(ui_text.other_language, elem_id="language", size="sm")
        with gr.Column(elem_id="chat"):
            self._history_html = _create_html("history")
            self._current_turn_html = _create_html("current-turn")
            self._notice_html = _create_html("notice")
        with gr.Column(elem_id="below"):
            with gr.Row(elem_id="tools"):
                self._regenerate_button = gr.Button(
                    ui_text.regenerate, size="sm", interactive=False
                )
                self._undo_button = gr.Button(ui_text.undo, size="sm", interactive=False)
                self._new_chat_button = gr.Button(ui_text.new_chat, size="sm", interactive=False)
                self._export_html = _create_html("export")
            self._tool_buttons = self._regenerate_button, self._undo_button, self._new_chat_button
            self._composer = gr.MultimodalTextbox(
                label=ui_text.question_label,
                show_label=False,
                placeholder=ui_text.question_placeholder,
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=MAX_MESSAGE_CHARS,
                max_lines=8,
                elem_id="composer",
            )
            with gr.Row(elem_id="choices"):
                self._compare_checkbox = gr.Checkbox(
                    label=ui_text.compare, elem_id="compare", visible=self._can_compare
                )
                self._thinking_checkbox = gr.Checkbox(
                    bool(self._default_thinking),
                    label=ui_text.thinking,
                    elem_id="thinking",
                    visible=self._default_thinking is not None,
                )
            with gr.Accordion(
                ui_text.settings, open=False, elem_id="settings"
            ) as self._settings_panel:
                self._max_new_tokens_slider = gr.Slider(
                    1,
                    MAX_NEW_TOKENS,
                    512,
                    step=1,
                    label=ui_text.max_new_tokens,
                    elem_id="max-new-tokens",
                )
                self._temperature_slider = gr.Slider(
                    0.0, MAX_TEMPERATURE, 0.0, step=0.05, label=ui_text.temperature,
                    info=ui_text.temperature_hint, elem_id="temperature",
                )  # fmt: skip

    def _connect_events(self) -> None:
        option_inputs = [
            self._compare_checkbox,
            self._thinking_checkbox,
            self._max_new_tokens_slider,
            self._temperature_slider,
        ]
        outputs = [
            self._history_html,
            self._current_turn_html,
            self._notice_html,
            self._export_html,
            self._language_button,
            *self._tool_buttons,
            self._composer,
            self._settings_panel,
            *option_inputs,
        ]
        event_options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        output_options = event_options | {"outputs": outputs}
        self.blocks.unload(self._on_unload)
        simple_events = [
            self.blocks.load(self._on_load, outputs=[self._title_html, *outputs], **event_options),
            self._composer.stop(self._on_stop, **event_options),
            self._undo_button.click(self._on_undo, **output_options),
            self._new_chat_button.click(self._on_new_chat, **output_options),
            self._language_button.click(self._on_language_click, **output_options),
        ]
        submit_event = self._composer.submit(
            self._on_submit, [self._composer, *option_inputs], **output_options
        )
        regenerate_event = self._regenerate_button.click(
            self._on_regenerate, option_inputs, **output_options
        )
        self.inputs: dict[int, Inputs] = {event["id"]: EMPTY_INPUT for event in simple_events}
        """Input types of the events that a browser may send, by event number."""
        self.inputs |= {
            submit_event["id"]: QUESTION_INPUT,
            regenerate_event["id"]: REGENERATE_INPUT,
        }

    def _get_session(self, request: gr.Request) -> WebSession:
        return self._session_store.get_or_create(str(request.session_hash))

    def _on_load(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        session.ui_text = select_ui_text(request.headers.get("accept-language", ""))
        title = Markup("<h1>finesight <span>{}</span></h1>").format(self._model_names[0])
        updates = self._render_labels(session.ui_text) | self._render_chat(session)
        return {self._title_html: title} | updates

    def _on_unload(self, request: gr.Request) -> None:
        self._session_store.close(str(request.session_hash))

    def _on_language_click(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        session.ui_text = get_other_language(session.ui_text)
        return self._render_labels(session.ui_text) | self._render_chat(session)

    def _on_stop(self, request: gr.Request) -> None:
        turns = self._get_session(request).chat.turns
        for reply in turns[-1].replies if turns else ():
            reply.cancel()

    def _on_undo(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        turn = session.chat.undo()
        if turn is None:
            return self._render_idle(session)
        session.remove_images(turn.image_paths)
        composer = gr.MultimodalTextbox(value={"text": turn.text, "files": []}, **IDLE_BUTTONS)
        return self._render_idle(session) | {self._composer: composer}

    def _on_new_chat(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        while (turn := session.chat.undo()) is not None:
            session.remove_images(turn.image_paths)
        return self._render_idle(session)

    async def _on_submit(
        self,
        message: dict[str, Any],
        compare: bool,
        thinking: bool,
        max_new_tokens: float,
        temperature: float,
        request: gr.Request,
    ) -> AsyncIterator[ComponentUpdates]:
        session = self._get_session(request)
        text, uploads = str(message["text"] or ""), [Path(name) for name in message["files"]]
        options = self._build_options(compare, thinking, max_new_tokens, temperature)

        def start_turn() -> ChatTurn:
            image_paths = session.add_uploads(text, uploads)
            try:
                return session.chat.send(text, image_paths, options)
            except BaseException:
                session.remove_images(image_paths)
                raise

        async for updates in self._stream_replies(session, start_turn, {"value": None}):
            yield updates

    async def _on_regenerate(
        self,
        compare: bool,
        thinking: bool,
        max_new_tokens: float,
        temperature: float,
        request: gr.Request,
    ) -> AsyncIterator[ComponentUpdates]:
        session = self._get_session(request)
        options = self._build_options(compare, thinking, max_new_tokens, temperature)

        def start_turn() -> ChatTurn:
            return session.chat.regenerate(options)

        async for updates in self._stream_replies(session, start_turn, {}):
            yield updates

    def _build_options(
        self, compare: bool, thinking: bool, max_new_tokens: float, temperature: float
    ) -> list[GenerationOptions]:
        options = GenerationOptions(
            max_new_tokens=int(min(max_new_tokens, MAX_NEW_TOKENS)),
            sampling_params=SamplingParams(temperature=temperature),
            thinking=DEFAULT_THINKING
            if self._default_thinking is None
            else ThinkingOptions(enable_thinking=thinking),
        )
        names = (None, BASE_MODEL_NAME) if compare and self._can_compare else (None,)
        return [replace(options, model=name) for name in names]

    async def _stream_replies(
        self,
        session: WebSession,
        start_turn: Callable[[], ChatTurn],
        composer_updates: Mapping[str, Any],
    ) -> AsyncIterator[ComponentUpdates]:
        """Yield updates of the page while completions are generated, and at their end.

        Args:
            session: Chat session of the user.
            start_turn: Starts the generation and returns the new turn. It may block.
            composer_updates: Updates of the message box when the generation has started.
        """
        turn_future = asyncio.ensure_future(
            asyncio.get_running_loop().run_in_executor(self._reader_pool, start_turn)
        )
        try:
            # Shielded, since the thread continues after the user has disconnected.
            turn = await asyncio.shield(turn_future)
        except asyncio.CancelledError:
            turn_future.add_done_callback(_cancel_replies)
            raise
        except UserError as error:
            yield {self._notice_html: _render_failure(session, error)}
            return
        turn_index = len(session.chat.turns) - 1
        yield {
            self._history_html: render_turns(session, session.chat.turns[:-1]),
            self._current_turn_html: render_turns(session, [turn], turn_index),
            self._notice_html: "",
            self._composer: gr.MultimodalTextbox(**composer_updates, **RUNNING_BUTTONS),
            **dict.fromkeys(self._tool_buttons, gr.Button(interactive=False)),
        }
        pending = {asyncio.create_task(_drain_reply(reply)) for reply in turn.replies}
        notice = ""
        try:
            while pending:
                finished, pending = await asyncio.wait(pending, timeout=UPDATE_INTERVAL_S)
                for task in finished:
                    notice = notice or _render_failure(session, task.exception())
                yield {self._current_turn_html: render_turns(session, [turn], turn_index)}
        finally:
            for reply in turn.replies:
                reply.cancel()
        yield self._render_idle(session) | {self._notice_html: notice}

    def _render_idle(self, session: WebSession) -> ComponentUpdates:
        """Return the updates that show the page without a running generation."""
        return {
            **self._render_chat(session),
            self._notice_html: "",
            self._composer: gr.MultimodalTextbox(**IDLE_BUTTONS),
            **dict.fromkeys(self._tool_buttons, gr.Button(interactive=bool(session.chat.turns))),
        }

    def _render_chat(self, session: WebSession) -> ComponentUpdates:
        ui_text, turns = session.ui_text, session.chat.turns
        history = Markup('<p class="welcome">{}</p>').format(ui_text.welcome)
        link = Markup('<a href="export/{}/chat.zip" download>{}</a>')
        return {
            self._history_html: render_turns(session, turns) if turns else history,
            self._current_turn_html: "",
            self._export_html: link.format(session.token, ui_text.export) if turns else "",
        }

    def _render_labels(self, ui_text: UiText) -> ComponentUpdates:
        return {
            self._language_button: gr.Button(ui_text.other_language),
            self._regenerate_button: gr.Button(ui_text.regenerate),
            self._undo_button: gr.Button(ui_text.undo),
            self._new_chat_button: gr.Button(ui_text.new_chat),
            self._composer: gr.MultimodalTextbox(
                label=ui_text.question_label, placeholder=ui_text.question_placeholder
            ),
            self._compare_checkbox: gr.Checkbox(label=ui_text.compare),
            self._thinking_checkbox: gr.Checkbox(label=ui_text.thinking),
            self._settings_panel: gr.Accordion(ui_text.settings),
            self._max_new_tokens_slider: gr.Slider(label=ui_text.max_new_tokens),
            self._temperature_slider: gr.Slider(
                label=ui_text.temperature, info=ui_text.temperature_hint
            ),
        }


def _create_html(elem_id: str) -> gr.HTML:
    return gr.HTML("", elem_id=elem_id, js_on_load=None, apply_default_css=False)


def _cancel_replies(turn_future: asyncio.Future[ChatTurn]) -> None:
    if not turn_future.cancelled() and turn_future.exception() is None:
        for reply in turn_future.result().replies:
            reply.cancel()


async def _drain_reply(reply: ChatReply) -> None:
    async for _ in reply:
        pass


def _render_failure(session: WebSession, error: BaseException | None) -> str:
    if error is None:
        return ""
    message = str(error) if isinstance(error, UserError) else session.ui_text.server_error
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    return render_notice(session.ui_text.error_title, message)
