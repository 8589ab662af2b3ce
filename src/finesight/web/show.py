"""Turns as HTML. All that people and models wrote is text: markup and formulas show as typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from finesight.data.sample import BoxPart
from finesight.infer.draw import COLOURS
from finesight.infer.talk import Reply, Turn
from finesight.web.visitors import Shown, Visitor

BOXED = (320, 640)
"""Least and most pixels of the width of a picture with boxes; its height has the same most."""


def turns_html(visitor: Visitor, turns: Sequence[Turn], first: int = 0) -> str:
    """Turns one below the other; `first` is the number of the first, from 0."""
    return "".join(_turn(visitor, turn, at) for at, turn in enumerate(turns, start=first + 1))


def welcome_html(visitor: Visitor) -> str:
    """What stands there before the first question."""
    return Markup('<p class="welcome">{}</p>').format(visitor.words.welcome)


def notice_html(title: str, message: str) -> str:
    """What went wrong."""
    inner = Markup("<strong>{}</strong> {}").format(title, message)
    return Markup('<div class="notice" role="alert">{}</div>').format(inner)


def export_html(visitor: Visitor) -> str:
    """A link to the talk as an archive, once there is one."""
    if not visitor.talk.turns:
        return ""
    return Markup('<a href="export/{}/talk.zip" download>{}</a>').format(
        visitor.token, visitor.words.export
    )


def title_html(model: str) -> str:
    """The head of the page."""
    return Markup("<h1>finesight <span>{}</span></h1>").format(model)


def _turn(visitor: Visitor, turn: Turn, number: int) -> str:
    words = visitor.words
    heading = Markup('<h2 class="unseen">{}</h2>').format(words.question.format(number))
    pictures = Markup("").join(
        _picture(visitor, visitor.pictures[path], "thumb") for path in turn.pictures
    )
    shown = Markup('<div class="thumbs">{}</div>').format(pictures) if pictures else Markup("")
    text = Markup('<p class="said">{}</p>').format(turn.text) if turn.text else Markup("")
    asked = Markup('<div class="asked">{}{}{}</div>').format(heading, shown, text)
    several = len(turn.replies) > 1
    replies = Markup("").join(_reply(visitor, reply, several) for reply in turn.replies)
    kind = "replies several" if several else "replies"
    answered = Markup('<div class="{}">{}</div>').format(kind, replies)
    return Markup('<section class="turn">{}{}</section>').format(asked, answered)


def _reply(visitor: Visitor, reply: Reply, several: bool) -> Markup:
    words, prediction = visitor.words, reply.prediction
    name = Markup("<h3>{}</h3>").format(reply.model) if several else Markup("")
    thought = Markup("")
    if prediction is not None and prediction.thought:
        thought = Markup("<details><summary>{}</summary><p>{}</p></details>").format(
            words.thought, prediction.thought
        )
    text = reply.text if prediction is None else prediction.answer
    state = "growing" if reply.finish is None else "ended"
    said = Markup('<p class="said {}">{}</p>').format(state, text)
    boxed = Markup("")
    if reply.boxes and reply.picture is not None:
        boxed = _boxed(visitor, visitor.pictures[reply.picture], reply.boxes)
    return Markup('<article class="reply">{}{}{}{}{}</article>').format(
        name, thought, said, boxed, _facts(visitor, reply)
    )


def _facts(visitor: Visitor, reply: Reply) -> Markup:
    words, prediction = visitor.words, reply.prediction
    if prediction is None:
        return Markup("")
    told = [words.tokens.format(prediction.tokens)]
    told += [words.boxes.format(len(reply.boxes))] if reply.boxes else []
    told += {"length": [words.length], "cancelled": [words.cancelled]}.get(reply.finish or "", [])
    told += [] if reply.content else [words.empty]
    return Markup('<p class="facts">{}</p>').format(" · ".join(told))


def _boxed(visitor: Visitor, shown: Shown, boxes: Sequence[BoxPart]) -> Markup:
    drawn = Markup("").join(_box(shown, box, number) for number, box in enumerate(boxes))
    # Small pictures are enlarged, large ones made to fit, so that boxes can be seen.
    wide = min(max(shown.width, BOXED[0]), BOXED[1], BOXED[1] * shown.width // shown.height)
    return Markup('<figure class="boxed" style="width:{}px">{}{}</figure>').format(
        max(wide, 1), _picture(visitor, shown, ""), drawn
    )


def _box(shown: Shown, box: BoxPart, number: int) -> Markup:
    """A frame in shares of the picture; corners in the wrong order make the box they span."""
    across = sorted(_share(x, shown.width) for x in box.xyxy[::2])
    down = sorted(_share(y, shown.height) for y in box.xyxy[1::2])
    place = (
        f"left:{across[0]:.3f}%;top:{down[0]:.3f}%;width:{across[1] - across[0]:.3f}%;"
        f"height:{down[1] - down[0]:.3f}%;--colour:{COLOURS[number % len(COLOURS)]}"
    )
    inside = " inside" if down[0] < 6 else ""
    left = " left" if across[0] > 60 else ""
    label = Markup("<b>{}</b>").format(box.label) if box.label else Markup("")
    return Markup('<span class="box{}{}" style="{}">{}</span>').format(inside, left, place, label)


def _share(place: float, whole: int) -> float:
    return 100 * min(max(place / whole, 0.0), 1.0)


def _picture(visitor: Visitor, shown: Shown, kind: str) -> Markup:
    alt = visitor.words.picture.format(shown.number, shown.name)
    return Markup('<img class="{}" src="{}" alt="{}" width="{}" height="{}">').format(
        kind, f"pictures/{visitor.token}/{shown.number}", alt, shown.width, shown.height
    )


def sign_in_html(template: Path, refused: bool, chinese: bool) -> str:
    """The page that asks for the password."""
    texts = ("密码", "进入", "密码不对") if chinese else ("Password", "Enter", "That is not it")
    told = Markup('<p role="alert">{}</p>').format(texts[2]) if refused else Markup("")
    page = Markup(template.read_text(encoding="utf-8"))
    return page.format(
        language="zh" if chinese else "en", password=texts[0], enter=texts[1], told=told
    )
