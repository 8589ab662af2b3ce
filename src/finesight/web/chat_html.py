"""Texts and HTML of the chat page. Texts of users and models are escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finesight.data.sample import BoxPart
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import BOX_COLORS

if TYPE_CHECKING:
    from finesight.web.web_sessions import ChatImage, WebSession

STATIC_FOLDER = Path(__file__).parent / "static"
BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""


UiLanguage = Literal["en", "zh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UiText:
    """Texts of the chat page in one language, by default English."""

    language: UiLanguage = "en"
    other_language: str = "中文"
    question_label: str = "Your question"
    question_placeholder: str = "Ask about images. Drop or paste them here."
    welcome: str = "Drop or paste an image below and ask about it."
    regenerate: str = "Regenerate"
    undo: str = "Undo"
    new_chat: str = "New chat"
    export: str = "Export"
    compare: str = "Ask the base model too"
    thinking: str = "Thinking mode"
    settings: str = "Settings"
    max_new_tokens: str = "Maximum tokens per answer"
    temperature: str = "Temperature"
    temperature_hint: str = "0: greedy decoding"
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
        "The server has no disk space for more images. Start a new chat, or try again later."
    )
    server_error: str = "The answer ended with a server error. See the terminal of the server."
    password: str = "Password"
    sign_in: str = "Sign in"
    wrong_password: str = "Wrong password"


ENGLISH = UiText()

CHINESE = UiText(
    language="zh",
    other_language="English",
    question_label="你的问题",
    question_placeholder="就图像提问，可拖入或粘贴图像。",
    welcome="在下方拖入或粘贴图像，然后提问。",
    regenerate="重新回答",
    undo="撤销",
    new_chat="新对话",
    export="导出",
    compare="同时询问基础模型",
    thinking="思考模式",
    settings="设置",
    max_new_tokens="每个回答的最大 token 数",
    temperature="温度",
    temperature_hint="0：贪心解码",
    question="问题 {}",
    image="图像 {}：{}",
    reasoning="思考过程",
    boxes="框：{}",
    tokens="token：{}",
    finish_length="已达最大长度，被截断",
    finish_cancelled="已停止",
    empty_reply="没有回答：后续对话不包含此轮",
    error_title="未能完成",
    too_many_images="共 {} 张图像；每个问题最多 {} 张，每次对话最多 {} 张。",
    message_too_long="共 {} 个字符；每个问题最多 {} 个。",
    disk_full="服务器没有空间存放更多图像。请开始新对话，或稍后再试。",
    server_error="服务器出错，回答中断；详情见其终端。",
    password="密码",
    sign_in="登录",
    wrong_password="密码错误",
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
    return template.render(
        session=session, text=session.ui_text, turns=turns, first_index=first_index
    )


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
}
