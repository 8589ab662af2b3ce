"""HTML of conversations on the chat page. Texts of users and models are escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

from markupsafe import Markup

from finesight.app.chat_store import MAX_CHATS_PER_BROWSER, ChatImage, StoredChat
from finesight.app.pages import render_page
from finesight.bounded_files import parse_json
from finesight.data.sample import BoxPart
from finesight.evaluate.mathml import FormulaConverter, render_mathml
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import BOX_COLORS
from finesight.report.i18n import get_language, translate

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


def render_turns(chat: StoredChat, turns: Sequence[ChatTurn], first_index: int = 0) -> str:
    """Render turns of a conversation, the first of which has an index in the conversation."""
    manifest = chat.session.service.manifest
    return render_page(
        "chat_turns.html",
        get_language(),
        chat=chat,
        turns=turns,
        first_index=first_index,
        is_formula=manifest is not None and manifest.metric == "latex",
        colors=BOX_COLORS,
        format_facts=_format_facts,
        get_boxed_width=_get_boxed_width,
        get_box_areas=_get_box_areas,
        render_answer=render_answer,
    )


def render_chats(current: str, chats: Sequence[StoredChat]) -> str:
    """Render the list of the conversations of a browser.

    Args:
        current: Token of the conversation that the page shows.
    """
    language = get_language()
    limit = MAX_CHATS_PER_BROWSER
    return render_page("chat_list.html", language, current=current, chats=chats, limit=limit)


@lru_cache(maxsize=256)
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


def _format_facts(reply: ChatReply) -> str:
    assert reply.prediction is not None, f"the reply of {reply.model} has not ended"
    facts = [translate("tokens: {}", reply.prediction.num_tokens)]
    if reply.boxes:
        facts.append(translate("boxes: {}", len(reply.boxes)))
    if reply.finish_reason == "length":
        facts.append(translate("truncated at the maximum length"))
    elif reply.finish_reason == "cancelled":
        facts.append(translate("stopped"))
    if not reply.content:
        facts.append(translate("no answer; following prompts omit this turn"))
    return " · ".join(facts)


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
