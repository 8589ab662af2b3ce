"""Render conversations of the chat page as HTML. Texts of users and models are escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finesight.data.sample import BoxPart
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import BOX_COLORS
from finesight.web.ui_text import UiText
from finesight.web.web_sessions import ChatImage, WebSession

STATIC_FOLDER = Path(__file__).parent / "static"
BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""


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
