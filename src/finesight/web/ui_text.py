"""Texts of the chat page in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
