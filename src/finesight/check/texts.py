"""Faults in the words of a sample: marks and tokens that a model would read letter by letter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from finesight.check.findings import Finding, Place
from finesight.data.sample import ImagePart, Message, Sample, TextPart

_MARK = re.compile(
    r"(?:Picture \d+:\s*)?<img>[^<\n]{1,500}</img>\n?"
    r"|<\|vision_start\|>(?:(?!<\|vision_start\|>).){0,500}?<\|vision_end\|>"
    r"|<image>\n?",
    re.DOTALL,
)
"""What stands for one whole picture in a text, in the formats of several programs."""

_PLACEHOLDER = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>|<imgpad>"
    r"|<(?P<tag>video|audio)>(?!.{0,2000}?</(?P=tag)>)",
    re.DOTALL,
)
"""What stands for a picture or a part of one, and was typed without the rest. In HTML <video> and
<audio> have an end."""

_BOX = re.compile(
    r"<\|(?:box|quad|object_ref)_(?:start|end)\|>|<(?:box|quad)>\s*\(|</?ref>|<bbox>|<ref-object>"
    r'|["\']bbox_2d["\']\s*:\s*\['
)
"""A box, or its label, written as text the way some family or program does."""

_SPECIAL = re.compile(r"<\|(?:endoftext|im_start|im_end|fim_\w+|repo_name|file_sep|extra_\d+)\|>")
"""Special tokens of any Qwen family that stand for neither pictures nor boxes."""

_REMEDY = "take it out of the text: a model reads it letter by letter, not as the token"


def further(tokens: Iterable[str]) -> tuple[str, ...]:
    """Those of a tokenizer's special tokens that are not looked for anyway."""
    known = (_PLACEHOLDER, _BOX, _SPECIAL)
    return tuple(t for t in tokens if not any(pattern.fullmatch(t) for pattern in known))


def text_findings(
    sample: Sample, place: Place, specials: Collection[str] = ()
) -> Iterator[Finding]:
    """Marks and tokens in the texts of a sample; `specials` are further ones to look for."""
    texts = [part.text for part in sample.parts() if isinstance(part, TextPart)]
    if not any(char in text for text in texts for char in "<{") and not specials:
        return
    yield from _marks(sample, place)
    bare = [_MARK.sub("", text) for text in texts]
    found = _first(_PLACEHOLDER, bare)
    if found:
        yield place.finding("placeholder-typed", f"{found} in a text", _REMEDY)
    found = _first(_BOX, bare)
    if found:
        remedy = "write boxes as parts of their own, in pixels; `finesight data import` reads them"
        yield place.finding("box-typed", f"{found} in a text", remedy)
    found = _first(_SPECIAL, bare) or _typed(specials, bare)
    if found:
        yield place.finding("special-token", f"{found} in a text", _REMEDY)


def without_marks(sample: Sample) -> Sample:
    """The sample without marks in the words of the user."""

    def cleaned(message: Message) -> Message:
        if message.role != "user":
            return message
        content = [
            TextPart(text=_MARK.sub("", part.text)) if isinstance(part, TextPart) else part
            for part in message.content
        ]
        left = tuple(p for p in content if not isinstance(p, TextPart) or p.text)
        return message.model_copy(update={"content": left})

    return sample.model_copy(update={"messages": tuple(map(cleaned, sample.messages))})


def _marks(sample: Sample, place: Place) -> Iterator[Finding]:
    marks = [
        (message.role, found[0].strip())
        for message in sample.messages
        for part in message.content
        if isinstance(part, TextPart)
        for found in _MARK.finditer(part.text)
    ]
    if not marks:
        return
    pictures = sum(isinstance(part, ImagePart) for part in sample.parts())
    shown = marks[0][1] if len(marks[0][1]) <= 60 else f"{marks[0][1][:57]}..."
    if len(marks) != pictures:
        yield place.finding(
            "marks-differ",
            f"{len(marks)} marks of pictures in the texts ({shown}), {pictures} pictures",
            "one picture for each mark, as a part of its own and without the mark",
        )
    else:
        mendable = all(role == "user" for role, _ in marks) and _stand_aside(sample)
        yield place.finding(
            "placeholder-typed",
            f"{shown} in a text; the sample's {pictures} pictures are parts of their own",
            "take the marks out of the text: pictures stand where their parts do",
            fix="marks taken out" if mendable and _stays_sound(sample) else None,
        )


def _stand_aside(sample: Sample) -> bool:
    """Whether marks stand before or after the words alone: amid them they may be spoken of."""
    texts = (part.text for part in sample.parts() if isinstance(part, TextPart))
    return all(sum(bool(piece.strip()) for piece in _MARK.split(text)) <= 1 for text in texts)


def _stays_sound(sample: Sample) -> bool:
    """Whether every turn of the user still says or shows something without its marks."""
    return all(message.content for message in without_marks(sample).messages)


def _first(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    return next((found[0] for text in texts for found in pattern.finditer(text)), None)


def _typed(tokens: Collection[str], texts: list[str]) -> str | None:
    return next((token for token in tokens for text in texts if token in text), None)
