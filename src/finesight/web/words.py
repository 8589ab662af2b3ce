"""What the page says, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The page's texts in one language; `other` names the other one, in that one."""

    language: Language
    other: str
    ask: str
    hint: str
    welcome: str
    again: str
    undo: str
    new: str
    export: str
    compare: str
    settings: str
    longest: str
    temperature: str
    greedy: str
    question: str
    picture: str
    thought: str
    boxes: str
    tokens: str
    length: str
    cancelled: str
    empty: str
    refused: str
    too_many: str
    too_long: str
    disk_full: str
    failed: str


ENGLISH = Words(
    language="en",
    other="中文",
    ask="Your question",
    hint="Ask about pictures. Drop or paste them here.",
    welcome="Drop a picture below, or paste one, and ask about it.",
    again="Again",
    undo="Undo",
    new="New talk",
    export="Export",
    compare="Ask the base model too",
    settings="Settings",
    longest="Longest answer, in tokens",
    temperature="Temperature",
    greedy="0: always the likeliest answer",
    question="Question {}",
    picture="Picture {}: {}",
    thought="Thought",
    boxes="boxes: {}",
    tokens="tokens: {}",
    length="cut off at the longest answer",
    cancelled="stopped",
    empty="no answer: this turn is left out of what follows",
    refused="That did not work",
    too_many="{} pictures; at most {} go with one question, {} with one talk.",
    too_long="{} characters; a question has at most {}.",
    disk_full="The server has no room for more images. Start a new talk, or try again later.",
    failed="The answer ended with an error of the server; its terminal says more.",
)

CHINESE = Words(
    language="zh",
    other="English",
    ask="你的问题",
    hint="就图片提问，可拖入或粘贴图片。",
    welcome="在下方拖入或粘贴图片，然后提问。",
    again="重新回答",
    undo="撤销",
    new="新对话",
    export="导出",
    compare="同时询问基础模型",
    settings="设置",
    longest="回答最长（token 数）",
    temperature="温度",
    greedy="0：总是最可能的回答",
    question="问题 {}",
    picture="图片 {}：{}",
    thought="思考过程",
    boxes="框：{}",
    tokens="token：{}",
    length="已达最长回答，被截断",
    cancelled="已停止",
    empty="没有回答：后续对话不包含此轮",
    refused="未能完成",
    too_many="共 {} 张图片；每个问题最多 {} 张，每次对话最多 {} 张。",
    too_long="共 {} 个字符；每个问题最多 {} 个。",
    disk_full="服务器没有空间存放更多图像。请开始新对话，或稍后再试。",
    failed="服务器出错，回答中断；详情见其终端。",
)


def preferred(accepted: str) -> Words:
    """The texts in the first language of an Accept-Language header that there is; else English."""
    for entry in accepted.lower().split(","):
        language = entry.split(";")[0].strip()
        for words in (ENGLISH, CHINESE):
            if language.split("-")[0] == words.language:
                return words
    return ENGLISH


def other_than(words: Words) -> Words:
    """The texts in the other language."""
    return CHINESE if words is ENGLISH else ENGLISH
