"""What the formats of box data sets share: labelled boxes of a picture become questions.

With `--ask detection` a picture makes one question, answered by all its boxes; with `--ask
grounding` one question for each label in it, answered by the boxes of that label. Boxes stand in
the order of their labels, then from the top down and from left to right. A picture without boxes
is answered with `none`, which scores as no boxes; grounding has nothing to ask of it. One with
objects of which none could be read is left out: `none` would be wrong.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.data.boxes import BadBox, BoxForm
from finesight.data.case import Case
from finesight.data.formats.format import BadOption, Reading, Scene, plain
from finesight.data.headers import SIDEWAYS, DamagedPicture, open_header, orientation
from finesight.data.limits import MAX_BOXES, check_count
from finesight.data.rows import Record, Row
from finesight.data.sample import BoxPart, Message, Part, TextPart
from finesight.errors import UserError

DETECTION_PROMPT = "Locate every object of these classes in the picture: {labels}."
"""What is asked with --ask detection unless --prompt says other."""

GROUNDING_PROMPT = "Locate every {label} in the picture."
"""What is asked with --ask grounding unless --prompt says other."""

NOTHING = "none"
"""The answer where a picture holds no object."""

UNREAD = "pictures whose objects are all of kinds that are not read"
UNASKED = "pictures without objects, of which --ask grounding asks nothing"

MAX_CLASSES = 100_000
"""Classes that a question may name, which is asked of each image."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class Marked:
    """One object: its class, its four numbers as the format has them, and further notes."""

    label: str
    numbers: Sequence[object]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pictured:
    """What a box data set says of one picture.

    `size` (height, width) is what the source gives, None if nothing. `classes` are the names that
    the whole source knows. `noted` counts what is not read, by what it is.
    """

    picture: object
    objects: Sequence[Marked]
    classes: Sequence[str]
    size: Size | None = None
    meta: Record = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)


def questions(row: Row, pictured: Pictured, reading: Reading, usual: BoxForm) -> list[Case]:
    """The cases that a picture makes; none where there is nothing to ask.

    Raises BadOption for a bad template, BadBox for a box outside of its picture (see `fitted`) and
    for a picture of another size than the source says.
    """
    check_count(len(pictured.objects), MAX_BOXES, "boxes")
    scene = Scene(reading)
    image = scene.picture(pictured.picture)
    check_size(pictured.size, scene.pictures[-1], reading)
    found = [(scene.box(one.numbers, one.label, usual), one.notes) for one in pictured.objects]
    found.sort(key=lambda pair: _order(pair[0]))
    reading.noted.update(pictured.noted)
    if not found and +pictured.noted:
        reading.left_out[UNREAD] += 1
        return []
    if reading.ask == "detection":
        if len(pictured.classes) > MAX_CLASSES:
            raise BadOption(
                f"a question that would name {len(pictured.classes):,} classes",
                where="--ask detection",
                expected=f"at most {MAX_CLASSES:,}",
                remedy="give --ask grounding, which asks for one class at a time",
            )
        asked = worded(reading.prompt, DETECTION_PROMPT, {"labels": ", ".join(pictured.classes)})
        told = "{labels}" in (reading.prompt if reading.prompt is not None else DETECTION_PROMPT)
        meta = {**pictured.meta, **({"classes": list(pictured.classes)} if told else {})}
        return [_case(row.id, [image, *asked], found, meta)]
    by_label: defaultdict[str, list[tuple[BoxPart, Mapping[str, Any]]]] = defaultdict(list)
    for box, notes in found:
        by_label[str(box.label)].append((box, notes))
    reading.left_out.update([UNASKED] if not by_label else [])
    return [
        _case(
            f"{row.id}-{label}",
            [image, *worded(reading.prompt, GROUNDING_PROMPT, {"label": label})],
            boxes,
            pictured.meta,
        )
        for label, boxes in by_label.items()
    ]


def worded(prompt: str | None, usual: str, values: Mapping[str, str]) -> list[TextPart]:
    """The question: the user's template or the usual one, with its values put in; "" is no text.

    Doubled braces stand for themselves. Raises BadOption for other braces than those of `values`
    and for a template without {label}, which would ask the same of every label, and UserError where
    there are no labels.
    """
    template = usual if prompt is None else prompt
    allowed = " or ".join(f"{{{name}}}" for name in values)
    try:
        fields = {
            f"{name}{'!' + change if change else ''}{':' + form if form else ''}"
            for _, name, form, change in string.Formatter().parse(template)
            if name is not None
        }
    except ValueError as error:
        raise _bad_template(template, str(error), allowed) from error
    unknown = sorted(fields - values.keys())
    if unknown:
        raise _bad_template(template, f"{{{unknown[0]}}} stands for nothing here", allowed)
    if "labels" in fields and not values["labels"]:
        raise UserError(
            "no object of the source has a class that could be asked for",
            expected="objects with labels, or a --prompt without {labels}",
            remedy="check the labels, or say with --prompt what to ask",
        )
    if "label" in values and "label" not in fields:
        raise _bad_template(template, "it asks the same of every label", allowed)
    text = template.format(**values)
    return [plain(text)] if text else []


def check_size(said: Size | None, picture: Path, reading: Reading) -> None:
    """Raise BadBox where the source gives a picture another size than it has.

    Its boxes are then in another frame: before the EXIF turn, or that of a resized copy.
    """
    try:
        actual = reading.pictures.size(picture)
    except DamagedPicture:
        if reading.lenient:
            return
        raise
    if said is None or said == actual:
        return
    shown = f"the boxes are in a frame of {said[1]} x {said[0]} pixels, the picture has "
    shown += f"{actual[1]} x {actual[0]}"
    if said == actual[::-1] and _is_turned(picture):
        raise BadBox(
            f"{shown} after its EXIF turn: it was labelled before the turn",
            where=str(picture),
            expected="boxes in the picture as viewers show it",
            remedy="take the EXIF orientation out of the pictures, so that they show as they were "
            "labelled, or turn the boxes",
        )
    raise BadBox(
        shown,
        where=str(picture),
        expected="the picture that was labelled, in its size",
        remedy="give the pictures that were labelled in place of resized or cropped copies",
    )


def _is_turned(picture: Path) -> bool:
    with open_header(picture) as image:
        return orientation(image) in SIDEWAYS


def _order(box: BoxPart) -> tuple[str, float, float, float, float]:
    x1, y1, x2, y2 = box.xyxy
    return (str(box.label), y1, x1, y2, x2)


def _case(
    name: str,
    asked: Sequence[Part],
    found: Sequence[tuple[BoxPart, Mapping[str, Any]]],
    meta: Record,
) -> Case:
    answer: tuple[Part, ...] = tuple(box for box, _ in found) or (TextPart(text=NOTHING),)
    notes = [dict(note) for _, note in found]
    whole = {**meta, **({"boxes": notes} if any(notes) else {})}
    return Case(name, (Message(role="user", content=tuple(asked)),), (answer,), meta=whole)


def _bad_template(template: str, why: str, allowed: str) -> BadOption:
    return BadOption(
        f"the template {template[:80]!r}: {why}",
        where="--prompt",
        expected=f"text with {allowed}",
        remedy="correct the template; {{ and }} stand for braces that are meant as such",
    )
