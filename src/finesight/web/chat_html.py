"""Render conversations of the chat page as HTML. Texts of users and models are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from finesight.data.sample import BoxPart
from finesight.infer.chat_session import ChatReply, ChatTurn
from finesight.infer.prediction import BOX_COLORS
from finesight.web.web_sessions import ChatImage, WebSession

BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""


def render_turns(session: WebSession, turns: Sequence[ChatTurn], first_index: int = 0) -> str:
    """Render turns of a conversation as HTML.

    Args:
        session: Chat session of the user.
        turns: Turns to render.
        first_index: Index of the first of these turns in the conversation.
    """
    return "".join(
        _render_turn(session, turn, turn_number)
        for turn_number, turn in enumerate(turns, start=first_index + 1)
    )


def render_welcome(session: WebSession) -> str:
    """Render the text that an empty conversation shows."""
    return Markup('<p class="welcome">{}</p>').format(session.ui_text.welcome)


def render_notice(title: str, message: str) -> str:
    """Render an error message with a title."""
    inner = Markup("<strong>{}</strong> {}").format(title, message)
    return Markup('<div class="notice" role="alert">{}</div>').format(inner)


def render_export_link(session: WebSession) -> str:
    """Render the link that exports the conversation; empty if there are no turns."""
    if not session.chat.turns:
        return ""
    return Markup('<a href="export/{}/chat.zip" download>{}</a>').format(
        session.token, session.ui_text.export
    )


def render_title(model: str) -> str:
    """Render the title of the page with the name of the model."""
    return Markup("<h1>finesight <span>{}</span></h1>").format(model)


def _render_turn(session: WebSession, turn: ChatTurn, turn_number: int) -> str:
    ui_text = session.ui_text
    heading = Markup('<h2 class="visually-hidden">{}</h2>').format(
        ui_text.question.format(turn_number)
    )
    thumbnails = Markup("").join(
        _render_image(session, session.images[path], "thumb") for path in turn.image_paths
    )
    thumbnail_list = (
        Markup('<div class="thumbs">{}</div>').format(thumbnails) if thumbnails else Markup("")
    )
    text = Markup('<p class="message-text">{}</p>').format(turn.text) if turn.text else Markup("")
    question = Markup('<div class="question">{}{}{}</div>').format(heading, thumbnail_list, text)
    is_comparison = len(turn.replies) > 1
    replies = Markup("").join(
        _render_reply(session, reply, is_comparison) for reply in turn.replies
    )
    css_class = "replies several" if is_comparison else "replies"
    reply_list = Markup('<div class="{}">{}</div>').format(css_class, replies)
    return Markup('<section class="turn">{}{}</section>').format(question, reply_list)


def _render_reply(session: WebSession, reply: ChatReply, is_comparison: bool) -> Markup:
    ui_text, prediction = session.ui_text, reply.prediction
    name = Markup("<h3>{}</h3>").format(reply.model) if is_comparison else Markup("")
    reasoning = Markup("")
    if prediction is not None and prediction.reasoning:
        reasoning = Markup("<details><summary>{}</summary><p>{}</p></details>").format(
            ui_text.reasoning, prediction.reasoning
        )
    text = reply.text if prediction is None else prediction.answer
    css_class = "streaming" if reply.finish_reason is None else "complete"
    paragraph = Markup('<p class="message-text {}">{}</p>').format(css_class, text)
    boxed_image = Markup("")
    if reply.boxes and reply.image_path is not None:
        boxed_image = _render_boxed_image(session, session.images[reply.image_path], reply.boxes)
    return Markup('<article class="reply">{}{}{}{}{}</article>').format(
        name, reasoning, paragraph, boxed_image, _render_stats(session, reply)
    )


def _render_stats(session: WebSession, reply: ChatReply) -> Markup:
    ui_text, prediction = session.ui_text, reply.prediction
    if prediction is None:
        return Markup("")
    stats = [ui_text.tokens.format(prediction.num_tokens)]
    stats += [ui_text.boxes.format(len(reply.boxes))] if reply.boxes else []
    stats += {"length": [ui_text.finish_length], "cancelled": [ui_text.finish_cancelled]}.get(
        reply.finish_reason or "", []
    )
    stats += [] if reply.content else [ui_text.empty_reply]
    return Markup('<p class="facts">{}</p>').format(" · ".join(stats))


def _render_boxed_image(session: WebSession, image: ChatImage, boxes: Sequence[BoxPart]) -> Markup:
    box_elements = Markup("").join(
        _render_box(image, box, box_index) for box_index, box in enumerate(boxes)
    )
    # Enlarge small images and shrink large ones to keep boxes visible.
    width = min(
        max(image.width, BOXED_IMAGE_WIDTHS[0]),
        BOXED_IMAGE_WIDTHS[1],
        BOXED_IMAGE_WIDTHS[1] * image.width // image.height,
    )
    return Markup('<figure class="boxed" style="width:{}px">{}{}</figure>').format(
        max(width, 1), _render_image(session, image, ""), box_elements
    )


def _render_box(image: ChatImage, box: BoxPart, box_index: int) -> Markup:
    """Render a bounding box in percent of the image.

    The corners of the box may be in any order.
    """
    left, right = sorted(_to_percent(x, image.width) for x in box.xyxy[::2])
    top, bottom = sorted(_to_percent(y, image.height) for y in box.xyxy[1::2])
    style = (
        f"left:{left:.3f}%;top:{top:.3f}%;width:{right - left:.3f}%;height:{bottom - top:.3f}%;"
        f"--box-color:{BOX_COLORS[box_index % len(BOX_COLORS)]}"
    )
    inside_class = " inside" if top < 6 else ""
    left_class = " left" if left > 60 else ""
    label = Markup("<b>{}</b>").format(box.label) if box.label else Markup("")
    return Markup('<span class="box{}{}" style="{}">{}</span>').format(
        inside_class, left_class, style, label
    )


def _to_percent(coordinate: float, size: int) -> float:
    return 100 * min(max(coordinate / size, 0.0), 1.0)


def _render_image(session: WebSession, image: ChatImage, css_class: str) -> Markup:
    alt = session.ui_text.image.format(image.number, image.name)
    return Markup('<img class="{}" src="{}" alt="{}" width="{}" height="{}">').format(
        css_class, f"images/{session.token}/{image.number}", alt, image.width, image.height
    )


def render_sign_in_page(template: Path, is_rejected: bool, is_chinese: bool) -> str:
    """Render the sign-in page.

    Args:
        template: HTML template.
        is_rejected: Whether the last password was wrong.
        is_chinese: Use Chinese instead of English.
    """
    texts = (
        ("密码", "登录", "密码错误") if is_chinese else ("Password", "Sign in", "Wrong password")
    )
    alert = Markup('<p role="alert">{}</p>').format(texts[2]) if is_rejected else Markup("")
    page = Markup(template.read_text(encoding="utf-8"))
    return page.format(
        language="zh" if is_chinese else "en", password=texts[0], sign_in=texts[1], alert=alert
    )
