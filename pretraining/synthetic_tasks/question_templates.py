"""Templates of the questions in synthetic samples, in English and Chinese."""

from __future__ import annotations

import random
from string import Formatter

from synthetic_tasks.synthetic_sample import ContentPart

CHINESE_FRACTION = 0.15
"""Probability that a question is in Chinese if it is available in both languages."""

ENGLISH_TEMPLATES = {
    "read": (
        "Read the text.",
        "What is written here?",
        "What does the picture say?",
        "Transcribe the text in the picture.",
        "What text do you see?",
    ),
    "read_at": (
        "What is written at {box}?",
        "Read the word at {box}.",
        "Which word is in {box}?",
        "What does {box} say?",
    ),
    "find": (
        "Where is the word {text}?",
        "Find {text}.",
        "Locate the text {text}.",
        "Give the box of {text}.",
    ),
    "spot": (
        "Read every word and give its box.",
        "Locate all words.",
        "Find all the text with its boxes.",
        "Which words are there, and where?",
    ),
    "count_words": (
        "How many words are there?",
        "Count the words.",
        "What is the number of words in the picture?",
    ),
    "formula": (
        "Write the formula in LaTeX.",
        "Give the LaTeX of this formula.",
        "Convert the formula to LaTeX.",
        "Which LaTeX code draws this formula?",
        "Transcribe the formula.",
    ),
    "describe": (
        "Describe the picture.",
        "What do you see?",
        "What is in the picture?",
        "Write a caption.",
    ),
    "count": ("How many {things} are there?", "Count the {things}.", "Number of {things}?"),
    "find_shapes": ("Find every {thing}.", "Locate each {thing}.", "Where is the {thing}?"),
    "all_shapes": (
        "Find all shapes.",
        "Locate every shape and name it.",
        "Which shapes are there, and where?",
    ),
    "shape_at": (
        "What is at {box}?",
        "Name the shape in {box}.",
        "Which shape is at {box}?",
    ),
    "is_it": ("Is the {first} {relation} the {second}?", "The {first} {relation} the {second}?"),
    "how_related": (
        "How does the {first} stand to the {second}?",
        "Where is the {first}, seen from the {second}?",
    ),
    "larger": (
        "Which is larger, the {first} or the {second}?",
        "The {first} or the {second}: which is larger?",
    ),
    "total": ("What is the total?", "How much is the total?", "Read the total."),
    "date": ("What is the date of the receipt?", "When was this bought?", "Read the date."),
    "price_of": ("How much is the {text}?", "What does the {text} cost?", "Price of {text}?"),
    "find_total": ("Where is the total?", "Find the amount of the total.", "Locate the total."),
    "items": ("How many different items were bought?", "Count the items."),
    "receipt": (
        "Give shop, date and total as JSON.",
        "Extract shop, date and total as JSON.",
        "Write the receipt's shop, date and total as JSON.",
    ),
    "prices": (
        "Give the items and their prices as JSON.",
        "List every item with its price as JSON.",
        "Extract the items with prices as JSON.",
    ),
}

CHINESE_TEMPLATES = {
    "read": ("图中写了什么?", "读出图中的文字。", "请识别文字。"),
    "read_at": ("{box}处写的是什么?", "读出{box}处的文字。"),
    "find": ("{text}在哪里?", "找到{text}。"),
    "spot": ("找出所有文字及其位置。", "图中有哪些文字,在哪里?"),
    "count_words": ("图中有几个词?", "数一数有多少个词。"),
    "formula": ("用LaTeX写出公式。", "这个公式的LaTeX是什么?"),
    "describe": ("描述这张图。", "图中有什么?"),
    "count": ("有几个{things}?", "数一数{things}。"),
    "find_shapes": ("找出{thing}。", "{thing}在哪里?"),
    "all_shapes": ("找出所有图形。", "图中有哪些图形,在哪里?"),
    "shape_at": ("{box}处是什么?", "说出{box}处的图形。"),
    "is_it": ("{first}在{second}{relation}吗?",),
    "how_related": ("{first}在{second}的哪边?",),
    "larger": ("{first}和{second}哪个更大?",),
    "total": ("总计是多少?", "合计多少钱?"),
    "date": ("收据的日期是什么?", "什么时候买的?"),
    "price_of": ("{text}多少钱?", "{text}的价格是多少?"),
    "find_total": ("总计在哪里?", "找到总计的金额。"),
    "items": ("买了几种东西?",),
    "receipt": ("用JSON写出商店、日期和总计。",),
    "prices": ("用JSON写出所有商品和价格。",),
}


def sample_is_chinese(rng: random.Random) -> bool:
    return rng.random() < CHINESE_FRACTION


def fill_template(
    task_kind: str, rng: random.Random, *, is_chinese: bool | None = None, **values: ContentPart
) -> tuple[ContentPart, ...]:
    """Sample a template of a question type and fill in texts and boxes.

    Args:
        task_kind: Question type.
        rng: Random number generator.
        is_chinese: Whether the question is in Chinese; sampled if None.
        values: Texts and boxes by their name in the template.
    """
    use_chinese = sample_is_chinese(rng) if is_chinese is None else is_chinese
    template = rng.choice((CHINESE_TEMPLATES if use_chinese else ENGLISH_TEMPLATES)[task_kind])
    parts: list[ContentPart] = []
    for text, name, _, _ in Formatter().parse(template):
        for part in (text, values[name] if name else ""):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
    return tuple(parts)
