"""Texts and HTML of the chat page. Texts of users and models are escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finesight.bounded_files import parse_json
from finesight.data.sample import BoxPart
from finesight.evaluate.mathml import FormulaConverter, render_mathml
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import BOX_COLORS
from finesight.report.i18n import Language, translate, use_language

if TYPE_CHECKING:
    from finesight.web.web_sessions import ChatImage, WebSession

STATIC_FOLDER = Path(__file__).parent / "static"
BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""


MAX_FORMULAS, MAX_JSON_CHARS = 200, 100_000
"""Maximum number of rendered formulas, and length of indented JSON, of an answer."""

MIN_WORDS = 4
"""Number of words from which an answer is prose, for example that of the base model."""

_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")
_STRING_OR_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*')
_CODE_FENCE = re.compile(r"\A```(?:json)?\n(.*)\n```\Z", re.DOTALL)
_NUMBER_LIST = re.compile(r"\[\n[-+\d.eE,\s]+\]")
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\\\[.+?\\\]|(?P<inline>\\\(.+?\\\))"
    # As in Pandoc, so that prices such as $5 and $6 are no formula.
    r"|(?<![\\\w$])(?P<dollar>\$(?![\s$])(?:\\.|[^\\$\n])+(?<!\s)\$)(?![\d$])",
    re.DOTALL,
)
"""Formula with delimiters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UiText:
    """Texts of the chat page in one language, by default English; `zh.yaml` translates them."""

    language: Language = "en"
    other_language: str = "中文"
    question_label: str = "Your question"
    question_placeholder: str = "Ask, or drop images here."
    image_hint: str = "No image is attached. The model was trained with images."
    welcome: str = "Drop or paste an image below and ask about it."
    regenerate: str = "Regenerate"
    undo: str = "Undo"
    new_chat: str = "New chat"
    export: str = "Export"
    compare: str = "Ask the base model too"
    thinking: str = "Thinking mode"
    settings: str = "Settings"
    max_new_tokens: str = "Maximum tokens per answer"
    max_new_tokens_hint: str = "Longer answers are truncated. Default: {}"
    temperature: str = "Temperature"
    temperature_hint: str = "0: greedy decoding, as in the evaluation. Default: 0"
    top_p: str = "Top-p"
    top_p_hint: str = "Probability of the tokens to sample from. Default: 1, all tokens"
    top_k: str = "Top-k"
    top_k_hint: str = "Number of tokens to sample from. Default: 0, all tokens"
    repetition_penalty: str = "Repetition penalty"
    repetition_penalty_hint: str = "Keep 1 for boxes, formulas and JSON. Default: 1"
    seed: str = "Seed"
    seed_hint: str = "Equal seeds give equal answers. Default: -1, a new seed for each answer"
    invalid_seed: str = "The seed is {}. Enter a whole number from -1 to {}."
    system_prompt: str = "System prompt"
    system_prompt_hint: str = "Empty: that of the training, with which the model answers best"
    no_system_prompt: str = "none"
    prompts: str = "Prompts of the training"
    chats: str = "Chats"
    chats_hint: str = (
        "Chats of this browser. Other users cannot see them. They are kept until the server"
        " stops, or until {} newer ones replace them."
    )
    no_chats: str = "No chats yet."
    rename: str = "Rename"
    delete: str = "Delete"
    delete_question: str = "Delete “{}”?"
    edit: str = "Edit"
    send: str = "Send"
    save: str = "Save"
    cancel: str = "Cancel"
    copy: str = "Copy"
    copied: str = "Copied"
    source: str = "Source"
    enlarge: str = "Enlarge: {}"
    close: str = "Close"
    missing_image: str = "The image is no longer on the server."
    busy: str = "An answer of this chat is being generated. Stop it, or wait for its end."
    question: str = "Question {}"
    image: str = "Image {}: {}"
    reasoning: str = "Reasoning"
    boxes: str = "boxes: {}"
    tokens: str = "tokens: {}"
    finish_length: str = "truncated at the maximum length"
    finish_cancelled: str = "stopped"
    empty_reply: str = "no answer; following prompts omit this turn"
    error_title: str = "Request failed"
    too_many_images: str = "{} images; at most {} per question and {} per chat."
    message_too_long: str = "{} characters; at most {} per question."
    disk_full: str = (
        "The server has no disk space for more images. Delete chats, or try again later."
    )
    server_error: str = "The answer ended with a server error. See the terminal of the server."
    password: str = "Password"
    sign_in: str = "Sign in"
    wrong_password: str = "Wrong password"


ENGLISH = UiText()

with use_language("zh"):
    CHINESE = UiText(
        **{key: translate(text) for key, text in asdict(ENGLISH).items() if key != "language"},
        language="zh",
    )


def select_ui_text(accept_language: str) -> UiText:
    """Return the page texts in the first supported language of an Accept-Language header.

    English is the default.
    """
    for entry in accept_language.lower().split(","):
        language = entry.split(";")[0].strip()
        for ui_text in (ENGLISH, CHINESE):
            if language.split("-")[0] == ui_text.language:
                return ui_text
    return ENGLISH


def get_other_language(ui_text: UiText) -> UiText:
    """Return the page texts in the other language, Chinese or English."""
    return CHINESE if ui_text is ENGLISH else ENGLISH


def render_turns(session: WebSession, turns: Sequence[ChatTurn], first_index: int = 0) -> str:
    """Render turns of a conversation, the first of which has an index in the conversation."""
    template = _ENVIRONMENT.get_template("turns.html")
    manifest = session.chat.service.manifest
    return template.render(
        session=session,
        text=session.ui_text,
        turns=turns,
        first_index=first_index,
        is_formula=manifest is not None and manifest.metric == "latex",
    )


def render_chats(current: WebSession, sessions: Sequence[WebSession], max_sessions: int) -> str:
    """Render the list of the conversations of a browser."""
    template = _ENVIRONMENT.get_template("chats.html")
    return template.render(
        current=current, sessions=sessions, max_sessions=max_sessions, text=current.ui_text
    )


def render_prompts(prompts: Sequence[str], ui_text: UiText) -> str:
    """Render suggested prompts, which the page inserts into the question field."""
    button = '<button type="button" data-prompt="{}" title="{}">{}</button>'
    buttons = Markup("").join(Markup(button).format(prompt, prompt, prompt) for prompt in prompts)
    group = Markup('<div class="prompts" role="group" aria-label="{}">{}</div>')
    return group.format(ui_text.prompts, buttons) if prompts else Markup("")


def render_answer(answer: str, is_formula: bool) -> Markup | None:
    """Render the formulas or the JSON of an answer; None if it has neither.

    Formulas become MathML of known elements, and all other text is escaped.

    Args:
        answer: Complete answer of a model.
        is_formula: Whether answers are LaTeX without delimiters, as in formula recognition.
    """
    is_bare = is_formula and not _FORMULA.search(answer) and len(_WORD.findall(answer)) < MIN_WORDS
    if is_bare and (formula := _render_formula(answer)) is not None:
        return Markup('<div class="formula" tabindex="0">{}</div>').format(formula)
    text = _CODE_FENCE.sub(r"\1", answer.strip())
    if text.startswith(("{", "[")) and (formatted := _format_json(text)) is not None:
        return Markup('<pre class="json" tabindex="0">{}</pre>').format(formatted)
    pieces: list[str | Markup] = []
    end = num_formulas = 0
    for match in _FORMULA.finditer(answer):
        formula = _render_formula(match[0]) if num_formulas < MAX_FORMULAS else None
        if formula is not None:
            is_display = match["inline"] is None and match["dollar"] is None
            tag = "div" if is_display else "span"
            markup = Markup('<{} class="formula">{}</{}>').format(tag, formula, tag)
            pieces += [answer[end : match.start()], markup]
            end, num_formulas = match.end(), num_formulas + 1
    if not num_formulas:
        return None
    return Markup('<div class="message-body">{}</div>').format(
        Markup("").join([*pieces, answer[end:]])
    )


@lru_cache(maxsize=1024)
def _render_formula(source: str) -> Markup | None:
    tree = FormulaConverter().convert(source)
    return None if tree is None else render_mathml(tree)


def _format_json(text: str) -> str | None:
    """Indent a JSON object, or a list of objects; None for other texts."""
    numbers: list[str] = []

    def replace(match: re.Match[str]) -> str:
        if match[0].startswith('"'):
            return match[0]
        numbers.append(match[0])
        return str(len(numbers) - 1)

    # ValueError also if an integer has too many digits.
    with suppress(ValueError):
        value = parse_json(text)
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(item, dict) for item in items):
            # Numbers are indices meanwhile: the parser would drop digits, as of 12.50.
            indices = parse_json(_STRING_OR_NUMBER.sub(replace, text))
            formatted = json.dumps(indices, ensure_ascii=False, indent=2)
            formatted = _STRING_OR_NUMBER.sub(
                lambda match: match[0] if match[0][0] == '"' else numbers[int(match[0])], formatted
            )
            # Lists of numbers, such as box corners, on one line. Strings contain no line breaks.
            formatted = _NUMBER_LIST.sub(lambda match: " ".join(match[0].split()), formatted)
            return formatted if len(formatted) <= MAX_JSON_CHARS else None
    return None


def render_notice(title: str, message: str) -> str:
    """Render an error message with a title."""
    inner = Markup("<strong>{}</strong> {}").format(title, message)
    return Markup('<div class="notice" role="alert">{}</div>').format(inner)


def render_sign_in_page(is_rejected: bool, ui_text: UiText) -> str:
    """Render the sign-in page, and whether the last password was wrong."""
    return _ENVIRONMENT.get_template("sign-in.html").render(is_rejected=is_rejected, text=ui_text)


def _format_stats(ui_text: UiText, reply: ChatReply) -> str:
    assert reply.prediction is not None, f"the reply of {reply.model} has not ended"
    stats = [ui_text.tokens.format(reply.prediction.num_tokens)]
    if reply.boxes:
        stats.append(ui_text.boxes.format(len(reply.boxes)))
    if reply.finish_reason == "length":
        stats.append(ui_text.finish_length)
    elif reply.finish_reason == "cancelled":
        stats.append(ui_text.finish_cancelled)
    if not reply.content:
        stats.append(ui_text.empty_reply)
    return " · ".join(stats)


def _get_boxed_width(image: ChatImage) -> int:
    """Return a display width that enlarges small images and shrinks large ones."""
    min_width, max_width = BOXED_IMAGE_WIDTHS
    width = min(max(image.width, min_width), max_width, max_width * image.width // image.height)
    return max(width, 1)


def _get_box_areas(
    image: ChatImage, boxes: Sequence[BoxPart]
) -> Iterator[tuple[float, float, float, float, str | None]]:
    """Yield the left, top, width and height of bounding boxes in percent, and their labels.

    The corners of a box may be in any order.
    """
    for box in boxes:
        left, right = sorted(100 * min(max(x / image.width, 0.0), 1.0) for x in box.xyxy[::2])
        top, bottom = sorted(100 * min(max(y / image.height, 0.0), 1.0) for y in box.xyxy[1::2])
        yield left, top, right - left, bottom - top, box.label


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(STATIC_FOLDER),
    autoescape=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.globals |= {
    "colors": BOX_COLORS,
    "format_stats": _format_stats,
    "get_boxed_width": _get_boxed_width,
    "get_box_areas": _get_box_areas,
    "render_answer": render_answer,
}
