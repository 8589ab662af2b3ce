"""Layout and event handlers of the chat page, built with Gradio."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.errors import UserError
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.web.access_middleware import (
    ACTION_INPUT,
    EMPTY_INPUT,
    QUESTION_INPUT,
    REGENERATE_INPUT,
    TOKEN_INPUT,
    ChatAction,
    Inputs,
    get_browser_id,
)
from finesight.web.chat_html import (
    ENGLISH,
    UiText,
    get_other_language,
    render_chats,
    render_notice,
    render_prompts,
    render_turns,
    select_ui_text,
)
from finesight.web.web_sessions import (
    MAX_MESSAGE_CHARS,
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_SESSIONS_PER_BROWSER,
    MAX_TEMPERATURE,
    MAX_TITLE_CHARS,
    MAX_TOP_K,
    ChatSettings,
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
ComponentValues = dict[Any, Any]

DEFAULT_MAX_NEW_TOKENS = 512

ACTION_SCRIPT = "(action, ...values) => [window.chatAction, ...values.slice(0, {})]"
"""JavaScript that reads the action of a button within HTML, and a number of settings."""

RESTORE_SCRIPT = "() => [sessionStorage.getItem('chat') ?? '']"


class ChatPage:
    """Gradio chat page for several users.

    A cookie identifies a browser, and the Gradio session ID one of its tabs.
    """

    def __init__(self, session_store: WebSessionStore) -> None:
        self._session_store, self._model_names = session_store, session_store.service.model_names
        self._reader_pool = ThreadPoolExecutor(
            NUM_READER_THREADS, thread_name_prefix="finesight-web"
        )
        self._tasks: set[asyncio.Task[str]] = set()
        self._default_thinking = session_store.service.default_thinking
        self._default_system_prompt = session_store.service.system_prompt or ""
        manifest = session_store.service.manifest
        self._prompts = () if manifest is None else manifest.prompts
        self._expects_images = manifest is not None and bool(manifest.has_images)
        self._max_new_tokens = min(MAX_NEW_TOKENS, session_store.service.max_model_len)
        default = None if manifest is None else manifest.max_new_tokens
        self._default_max_new_tokens = min(default or DEFAULT_MAX_NEW_TOKENS, self._max_new_tokens)
        self._can_compare = BASE_MODEL_NAME in self._model_names[1:]
        with gr.Blocks(title="finesight", analytics_enabled=False, fill_width=True) as self.blocks:
            self._build_layout()
            self._connect_events()

    def _build_layout(self) -> None:
        ui_text = ENGLISH
        with gr.Row(elem_id="head"):
            self._title_html = _create_html("title")
            self._chats_html = _create_html("chats")
            self._language_button = gr.Button(ui_text.other_language, elem_id="language", size="sm")
        # Filled by page.js for buttons within HTML.
        self._action_json = gr.JSON(visible=False)
        self._tab_textbox = gr.Textbox(visible=False)
        self._action_button = gr.Button(elem_id="action", visible="hidden")
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
            self._prompts_html = _create_html("prompts")
            self._image_hint_html = _create_html("image-hint")
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
                sliders = {
                    "max_new_tokens": (1, self._max_new_tokens, self._default_max_new_tokens, 1),
                    "temperature": (0, MAX_TEMPERATURE, 0, 0.05),
                    "top_p": (0.01, 1, 1, 0.01),
                    "top_k": (0, MAX_TOP_K, 0, 1),
                    "repetition_penalty": (1, MAX_REPETITION_PENALTY, 1, 0.01),
                }
                self._sliders = {
                    name: gr.Slider(
                        *bounds, step=step, elem_id=name.replace("_", "-"),
                        **self._get_labels(ui_text, name),
                    )
                    for name, (*bounds, step) in sliders.items()
                }  # fmt: skip
                self._seed_number = gr.Number(
                    -1, elem_id="seed", **self._get_labels(ui_text, "seed")
                )
                self._system_prompt_textbox = gr.Textbox(
                    self._default_system_prompt,
                    lines=2,
                    max_lines=8,
                    max_length=MAX_MESSAGE_CHARS,
                    elem_id="system-prompt",
                    **self._get_labels(ui_text, "system_prompt"),
                )
        self._setting_inputs: dict[str, Any] = {
            "compare": self._compare_checkbox,
            "thinking": self._thinking_checkbox,
            **self._sliders,
            "seed": self._seed_number,
            "system_prompt": self._system_prompt_textbox,
        }
        """Components of `ChatSettings` by name, in the order of its fields."""

    def _get_labels(self, ui_text: UiText, name: str) -> dict[str, Any]:
        """Return the label of a setting, and its hint with the default."""
        max_new_tokens_hint = ui_text.max_new_tokens_hint.format(self._default_max_new_tokens)
        label, hint = {
            "max_new_tokens": (ui_text.max_new_tokens, max_new_tokens_hint),
            "temperature": (ui_text.temperature, ui_text.temperature_hint),
            "top_p": (ui_text.top_p, ui_text.top_p_hint),
            "top_k": (ui_text.top_k, ui_text.top_k_hint),
            "repetition_penalty": (ui_text.repetition_penalty, ui_text.repetition_penalty_hint),
            "seed": (ui_text.seed, ui_text.seed_hint),
            "system_prompt": (ui_text.system_prompt, ui_text.system_prompt_hint),
        }[name]
        placeholder = {"placeholder": self._default_system_prompt or ui_text.no_system_prompt}
        return {"label": label, "info": hint, **(placeholder if name == "system_prompt" else {})}

    def _connect_events(self) -> None:
        option_inputs = [*self._setting_inputs.values()]
        outputs = [
            self._chats_html,
            self._history_html,
            self._current_turn_html,
            self._notice_html,
            self._export_html,
            self._prompts_html,
            self._image_hint_html,
            self._language_button,
            *self._tool_buttons,
            self._composer,
            self._settings_panel,
            *option_inputs,
        ]
        event_options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        output_options = event_options | {"outputs": outputs}
        # Another conversation may be used while an answer is being generated.
        generation_options = output_options | {"trigger_mode": "multiple"}
        self.blocks.unload(self._on_unload)
        load_event = self.blocks.load(
            self._on_load,
            self._tab_textbox,
            [self._title_html, *outputs],
            js=RESTORE_SCRIPT,
            **event_options,
        )
        simple_events = [
            self._composer.stop(self._on_stop, **event_options),
            self._undo_button.click(self._on_undo, **output_options),
            self._new_chat_button.click(self._on_new_chat, **output_options),
            self._language_button.click(self._on_language_click, **output_options),
        ]
        # Sets become dictionaries by component, sent in the order of their creation.
        submit_event = self._composer.submit(
            self._on_submit, {self._composer, *option_inputs}, **generation_options
        )
        regenerate_event = self._regenerate_button.click(
            self._on_regenerate, {*option_inputs}, **generation_options
        )
        action_event = self._action_button.click(
            self._on_action,
            {self._action_json, *option_inputs},
            js=ACTION_SCRIPT.format(len(option_inputs)),
            **generation_options,
        )
        self.inputs: dict[int, Inputs] = {event["id"]: EMPTY_INPUT for event in simple_events}
        """Input types of the events that a browser may send, by event number."""
        self.inputs |= {
            load_event["id"]: TOKEN_INPUT,
            action_event["id"]: ACTION_INPUT,
            submit_event["id"]: QUESTION_INPUT,
            regenerate_event["id"]: REGENERATE_INPUT,
        }

    def _get_session(self, request: gr.Request) -> WebSession:
        return self._session_store.get_or_create(*_get_ids(request))

    async def _on_load(self, token: str, request: gr.Request) -> AsyncIterator[ComponentUpdates]:
        session = self._session_store.restore(*_get_ids(request), token)
        if not session.chat.turns:
            session.ui_text = select_ui_text(request.headers.get("accept-language", ""))
        title = Markup("<h1>finesight <span>{}</span></h1>").format(self._model_names[0])
        yield {
            self._title_html: title,
            **self._render_labels(session.ui_text),
            **self._render_state(session),
            **self._render_settings(session),
        }
        async for updates in self._follow(session, request):
            yield updates

    def _on_unload(self, request: gr.Request) -> None:
        self._session_store.close(*_get_ids(request))

    def _on_language_click(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        session.ui_text = get_other_language(session.ui_text)
        return self._render_labels(session.ui_text) | self._render_state(session)

    def _on_stop(self, request: gr.Request) -> None:
        turns = self._get_session(request).chat.turns
        for reply in turns[-1].replies if turns else ():
            reply.cancel()

    def _on_undo(self, request: gr.Request) -> ComponentUpdates:
        session = self._get_session(request)
        if session.is_generating:
            # Another tab of the conversation waits for the answer.
            return self._render_state(session)
        turn = session.chat.undo()
        if turn is None:
            return self._render_state(session)
        session.remove_images(turn.image_paths)
        composer = gr.MultimodalTextbox(value={"text": turn.text, "files": []}, **IDLE_BUTTONS)
        return self._render_state(session) | {self._composer: composer}

    def _on_new_chat(self, request: gr.Request) -> ComponentUpdates:
        return self._render_state(self._session_store.open(*_get_ids(request), ""))

    async def _on_action(
        self, values: ComponentValues, request: gr.Request
    ) -> AsyncIterator[ComponentUpdates]:
        action = ChatAction.model_validate(values[self._action_json])
        session = self._get_session(request)
        if action.kind == "edit":
            removed_turns = session.chat.turns[action.index :]

            def start_turn(options: Sequence[GenerationOptions]) -> ChatTurn:
                session.check_text(action.text)
                turn = session.chat.edit(action.index, action.text, options)
                session.remove_images([path for one in removed_turns for path in one.image_paths])
                return turn

            async for updates in self._generate(session, request, values, start_turn, {}):
                yield updates
            return
        chats = self._session_store.list_chats(session.browser_id)
        target = next((chat for chat in chats if chat.token == action.token), None)
        if target is not None and action.kind == "rename":
            target.title = action.text.strip()[:MAX_TITLE_CHARS]
        elif action.kind == "open" or (action.kind == "delete" and target is session):
            token = action.token if action.kind == "open" else ""
            session = self._session_store.open(*_get_ids(request), token)
        if target is not None and action.kind == "delete":
            self._session_store.delete(target)
        settings = self._render_settings(session) if action.kind == "open" else {}
        yield self._render_labels(session.ui_text) | self._render_state(session) | settings
        async for updates in self._follow(session, request):
            yield updates

    async def _on_submit(
        self, values: ComponentValues, request: gr.Request
    ) -> AsyncIterator[ComponentUpdates]:
        session, message = self._get_session(request), values[self._composer]
        text, uploads = str(message["text"] or ""), [Path(name) for name in message["files"]]

        def start_turn(options: Sequence[GenerationOptions]) -> ChatTurn:
            image_paths = session.add_uploads(text, uploads)
            try:
                return session.chat.send(text, image_paths, options)
            except BaseException:
                session.remove_images(image_paths)
                raise

        cleared = {"value": None}
        async for updates in self._generate(session, request, values, start_turn, cleared):
            yield updates

    async def _on_regenerate(
        self, values: ComponentValues, request: gr.Request
    ) -> AsyncIterator[ComponentUpdates]:
        session = self._get_session(request)
        start_turn = session.chat.regenerate
        async for updates in self._generate(session, request, values, start_turn, {}):
            yield updates

    def _apply_settings(
        self, session: WebSession, values: ComponentValues
    ) -> list[GenerationOptions]:
        """Store the settings in the conversation, and return the options of each model.

        Raises:
            UserError: The seed is invalid.
        """
        inputs = {name: values[component] for name, component in self._setting_inputs.items()}
        # The browser sends null for an empty field.
        seed = -1 if inputs["seed"] is None else inputs["seed"]
        if seed != int(seed) or not -1 <= seed <= MAX_SEED:
            raise UserError(session.ui_text.invalid_seed.format(seed, MAX_SEED))
        settings = ChatSettings(**inputs | {"seed": int(seed)})
        system_prompt = settings.system_prompt
        is_default = not system_prompt.strip() or system_prompt == self._default_system_prompt
        session.settings = settings
        session.chat.system_prompt = None if is_default else system_prompt
        options = GenerationOptions(
            max_new_tokens=int(min(settings.max_new_tokens, self._max_new_tokens)),
            sampling_params=SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=int(settings.top_k),
                repetition_penalty=settings.repetition_penalty,
                seed=settings.seed if settings.seed >= 0 else None,
            ),
            thinking=DEFAULT_THINKING
            if self._default_thinking is None
            else ThinkingOptions(enable_thinking=settings.thinking),
        )
        can_compare = settings.compare and self._can_compare
        names = (None, BASE_MODEL_NAME) if can_compare else (None,)
        return [replace(options, model=name) for name in names]

    async def _generate(
        self,
        session: WebSession,
        request: gr.Request,
        values: ComponentValues,
        start_turn: Callable[[Sequence[GenerationOptions]], ChatTurn],
        composer_updates: Mapping[str, Any],
    ) -> AsyncIterator[ComponentUpdates]:
        """Yield updates of a tab while completions are generated, and at their end.

        The generation continues if the tab shows another conversation, or if the tab is closed
        while another tab shows this one.

        Args:
            session: Conversation of the tab.
            request: Request of the tab.
            values: Settings of the tab.
            start_turn: Starts the generation and returns the new turn. It may block.
            composer_updates: Updates of the message box when the generation has started.
        """
        if session.is_generating:
            ui_text = session.ui_text
            yield {self._notice_html: render_notice(ui_text.error_title, ui_text.busy)}
            return
        try:
            options = self._apply_settings(session, values)
        except UserError as error:
            yield {self._notice_html: _render_failure(session, error)}
            return
        session.is_generating = True
        started: asyncio.Future[ChatTurn] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run_turn(session, partial(start_turn, options), started))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            start_or_failure: list[asyncio.Future[Any]] = [started, task]
            await asyncio.wait(start_or_failure, return_when=asyncio.FIRST_COMPLETED)
            turn_index = len(session.chat.turns) - 1
            updates: ComponentUpdates = {}
            if not started.cancelled():
                updates = {
                    self._history_html: render_turns(session, session.chat.turns[:-1]),
                    self._notice_html: "",
                    self._image_hint_html: "",
                    self._composer: gr.MultimodalTextbox(**composer_updates, **RUNNING_BUTTONS),
                    **dict.fromkeys(self._tool_buttons, gr.Button(interactive=False)),
                }
            while updates or not task.done():
                turn_html = render_turns(session, [started.result()], turn_index)
                if _is_shown(session, request):
                    yield updates | {self._current_turn_html: turn_html}
                updates = {}
                await asyncio.wait([task], timeout=UPDATE_INTERVAL_S)
            notice = task.result()
        finally:
            # Only a closed tab ends this event early.
            if not task.done() and session.tabs <= {str(request.session_hash)}:
                started.add_done_callback(_cancel_replies)
        if _is_shown(session, request):
            yield self._render_state(session) | {self._notice_html: notice}

    async def _run_turn(
        self,
        session: WebSession,
        start_turn: Callable[[], ChatTurn],
        started: asyncio.Future[ChatTurn],
    ) -> str:
        """Generate the completions of a turn, independently of the tabs.

        Args:
            started: Receives the turn. It is cancelled if the turn cannot be started.

        Returns:
            Notice of an error, or an empty text.
        """
        try:
            loop = asyncio.get_running_loop()
            turn = await loop.run_in_executor(self._reader_pool, start_turn)
            started.set_result(turn)
            results = await asyncio.gather(*map(_drain_reply, turn.replies), return_exceptions=True)
            return next(filter(None, [_render_failure(session, one) for one in results]), "")
        except UserError as error:
            return _render_failure(session, error)
        finally:
            started.cancel()
            _cancel_replies(started)
            session.is_generating = False

    async def _follow(
        self, session: WebSession, request: gr.Request
    ) -> AsyncIterator[ComponentUpdates]:
        """Yield updates of a tab that shows an answer whose generation another event started."""
        if not session.is_generating:
            return
        while session.is_generating and _is_shown(session, request):
            await asyncio.sleep(UPDATE_INTERVAL_S)
            index = len(session.chat.turns) - 1
            turns = session.chat.turns[-1:]
            yield {self._current_turn_html: render_turns(session, turns, index)}
        if _is_shown(session, request):
            yield self._render_state(session)

    def _render_state(self, session: WebSession) -> ComponentUpdates:
        """Return the updates that show a conversation."""
        ui_text, turns = session.ui_text, session.chat.turns
        is_running = session.is_generating and bool(turns)
        num_complete = len(turns) - is_running
        welcome = Markup('<p class="welcome">{}</p>').format(ui_text.welcome)
        link = Markup('<a href="export/{}/chat.zip" download>{}</a>')
        chats = self._session_store.list_chats(session.browser_id)
        buttons = RUNNING_BUTTONS if is_running else IDLE_BUTTONS
        needs_image = self._expects_images and not any(turn.image_paths for turn in turns)
        can_use_tools = bool(turns) and not is_running
        labels = ui_text.regenerate, ui_text.undo, ui_text.new_chat
        return {
            self._chats_html: render_chats(session, chats, MAX_SESSIONS_PER_BROWSER),
            self._history_html: render_turns(session, turns[:num_complete]) if turns else welcome,
            self._current_turn_html: render_turns(session, turns[num_complete:], num_complete),
            self._export_html: link.format(session.token, ui_text.export) if turns else "",
            self._prompts_html: render_prompts(self._prompts, ui_text),
            self._image_hint_html: f"<p>{ui_text.image_hint}</p>" * needs_image,
            self._notice_html: "",
            self._composer: gr.MultimodalTextbox(
                label=ui_text.question_label, placeholder=ui_text.question_placeholder, **buttons
            ),
            **{
                button: gr.Button(label, interactive=can_use_tools)
                for button, label in zip(self._tool_buttons, labels, strict=True)
            },
        }

    def _render_settings(self, session: WebSession) -> ComponentUpdates:
        """Return the settings of the last answer of a conversation; none without answers."""
        settings = {} if session.settings is None else asdict(session.settings)
        return {self._setting_inputs[name]: value for name, value in settings.items()}

    def _render_labels(self, ui_text: UiText) -> ComponentUpdates:
        return {
            self._language_button: gr.Button(ui_text.other_language),
            self._compare_checkbox: gr.Checkbox(label=ui_text.compare),
            self._thinking_checkbox: gr.Checkbox(label=ui_text.thinking),
            self._settings_panel: gr.Accordion(ui_text.settings),
            **{
                slider: gr.Slider(**self._get_labels(ui_text, name))
                for name, slider in self._sliders.items()
            },
            self._seed_number: gr.Number(**self._get_labels(ui_text, "seed")),
            self._system_prompt_textbox: gr.Textbox(**self._get_labels(ui_text, "system_prompt")),
        }


def _get_ids(request: gr.Request) -> tuple[str, str | None]:
    """Return the ID of a tab and, if it sends cookies, of its browser."""
    assert request.request is not None, "events have a request"
    return str(request.session_hash), get_browser_id(request.request)


def _is_shown(session: WebSession, request: gr.Request) -> bool:
    return str(request.session_hash) in session.tabs


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
