"""What a reader of a foreign format is, and what it may lean on while it reads a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from finesight.data.boxes import BadBox, Box, BoxForm, BoxFormat, BoxUnits, fitted, four_numbers
from finesight.data.case import Case
from finesight.data.jsonl import Located
from finesight.data.limits import MAX_BOXES, check_count
from finesight.data.pictures import Pictures
from finesight.data.rows import Record, Row, Rows
from finesight.data.sample import BoxPart, ImagePart, Part, TextPart
from finesight.errors import UserError

Ask = Literal["detection", "grounding"]
"""Of a box data set: one question for all boxes of a picture, or one for each label."""

PICTURE_KEYS = ("image", "images")
UNREAD_KEYS = (
    *("video", "videos", "audio", "audios"),
    *("tools", "objects", "history", "kto_tag"),
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
)
"""Keys by which other programs add to a conversation what would be lost here: media, tools, boxes,
earlier turns, and that an answer is a bad one."""

_MARKS = re.compile(
    r"<\|(?:vision|image|video|box|object_ref)_\w+\|>|<img>|<(?:box|quad)>\s*\("
    r"|<image>|<bbox>|<ref-object>"
)


class StrayMark(UserError):
    """A mark in a text that stands for a picture or a box to some other format."""


class BadOption(UserError):
    """An option that fits no row of the source: it is told at once, not for each row."""


class MarksDiffer(UserError):
    """Marks of pictures in the texts of a row, and its pictures, that are not as many."""


class UnreadKey(UserError):
    """A key whose value would be lost."""


@dataclass(frozen=True, slots=True)
class RawBox:
    """The numbers of a box as the source holds them, and as what they were read."""

    numbers: Box
    picture: Path
    form: BoxForm
    label: str | None = None


_REFERENCE = re.compile(
    r"<\|object_ref_start\|>((?:(?!<\|object_ref_).)*)<\|object_ref_end\|>", re.DOTALL
)


@dataclass(slots=True)
class Reading:
    """What one import knows while it reads: its pictures and what the user said about the rows.

    `raw` are all boxes as they were found; `clipped` counts those that stood out of their picture
    by no more than rounding explains. A `lenient` reading takes every box as it is. `noted` counts,
    by what it is, what the source holds beyond its samples; `left_out` counts, by reason, rows that
    made no case because they say nothing to learn.
    """

    pictures: Pictures
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    ask: Ask = "detection"
    lenient: bool = False
    raw: list[RawBox] = field(default_factory=list)
    clipped: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def form(self, usual: BoxForm) -> BoxForm:
        """How boxes are meant: what the user declared, else the format's `usual`."""
        if self.box_format is None and self.box_units is None:
            return usual
        return replace(
            usual,
            format=self.box_format or usual.format,
            units=self.box_units or usual.units,
        )

    def box(self, value: object, picture: Path, usual: BoxForm, label: str | None = None) -> Box:
        """Two corners in pixels, inside of the picture, from four numbers; see `fitted`."""
        form = self.form(usual)
        a, b, c, d = four_numbers(value)
        self.raw.append(RawBox((a, b, c, d), picture, form, label))
        if self.lenient and form.units == "pixel":
            return form.to_pixels((a, b, c, d), (0, 0))
        size = self.pictures.size(picture)
        exact = form.to_pixels((a, b, c, d), size)
        if self.lenient:
            return exact
        inside = fitted(exact, size, form)
        self.clipped += inside != exact
        return inside

    def asked(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The first user turn: its parts as they are, then the user's `--prompt`.

        A prompt after text starts a new line. Raises UserError when there is no word at all.
        """
        if self.prompt is None and not any(p.type == "text" and p.text.strip() for p in parts):
            raise UserError(
                f"a question without words (pictures: {len(parts)})",
                expected="something that the model is asked about the picture",
                remedy='give --prompt "..." (or --prompt "" to ask by the picture alone)',
            )
        if not self.prompt:
            return tuple(parts)
        if parts and isinstance(parts[-1], TextPart):
            return (*parts[:-1], TextPart(text=f"{parts[-1].text}\n{self.prompt}"))
        return (*parts, TextPart(text=self.prompt))


class Scene:
    """The pictures of one row in the order in which they come up, and the boxes in them."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._boxes = 0
        self.pictures: list[Path] = []

    def picture(self, value: object) -> ImagePart:
        """The picture that `value` means (see `Pictures.take`), now the most recent one."""
        self.pictures.append(self._reading.pictures.take(value))
        return ImagePart(image=str(self.pictures[-1]))

    def box(
        self, value: object, label: str | None, usual: BoxForm, image: int | None = None
    ) -> BoxPart:
        """A box in the most recent picture, or in number `image`, from four numbers in the
        declared or usual form."""
        if not self.pictures:
            raise UserError(
                f"the box {value} comes before any picture",
                expected="a picture before the box",
                remedy="put the picture first, or leave the row out",
            )
        self._boxes += 1
        check_count(self._boxes, MAX_BOXES, "boxes")
        place = len(self.pictures) - 1 if image is None else image
        if place >= len(self.pictures):
            raise BadBox(
                f"a box in picture number {place}, counted from 0",
                expected=f"a number below {len(self.pictures)}, the pictures before it",
                remedy="correct the row",
            )
        xyxy = self._reading.box(value, self.pictures[place], usual, label)
        return BoxPart(image=place, label=label, xyxy=xyxy)

    def need_one_picture(self) -> None:
        """Raise UserError unless it is plain which picture a box belongs to."""
        if len(self.pictures) != 1:
            raise UserError(
                f"boxes in a row with {len(self.pictures)} pictures",
                expected="one picture, so that it is plain where the boxes are",
                remedy="write the rows as samples, where each box names its picture",
            )


@dataclass(slots=True)
class Writing:
    """What a writer of a format may lean on: names and sizes of pictures, and what is lost.

    `lost` counts, by what it is, what the samples hold and the format has no place for; `notes`
    are for the user: how to read the files, and what they cannot say themselves.
    """

    names: Mapping[Path, str]
    sizes: Callable[[Path], tuple[int, int]]
    lost: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """What the output's files call a picture: its path from the output folder."""
        return self.names[path]

    def size(self, path: Path) -> tuple[int, int]:
        """Height and width of a picture after its EXIF turn. Raises DamagedPicture."""
        return self.sizes(path)


@dataclass(frozen=True, slots=True)
class Format:
    """One foreign format: how to know it, how to read a row of it and how to write samples in it.

    `detect` looks at the first records and says what it recognised, or None. `keys` are those by
    which an unknown file is compared; `takes` are the options that mean something here ("map",
    "prompt", "boxes", "ask"). A row makes one case, or several (a question for each label).

    `open` is for sources that are no file of rows (a folder, one JSON document): their rows and
    what they were known by, None for anything else. `write` gives the output's files as relative
    names with their content, a name that comes again going on with its file; it raises UserError
    for a sample that the format cannot hold.
    """

    name: str
    looks: str
    keys: frozenset[str]
    detect: Callable[[Sequence[Record]], str | None]
    read: Callable[[Row, Reading], Case | list[Case]]
    takes: frozenset[str] = frozenset()
    open: Callable[[Path], tuple[Rows, str] | None] | None = None
    write: Callable[[Sequence[Located], Writing], Iterator[tuple[str, bytes]]] | None = None

    def cases(self, row: Row, reading: Reading) -> list[Case]:
        """The cases of a row; see `read`."""
        made = self.read(row, reading)
        return [made] if isinstance(made, Case) else made


def never(records: Sequence[Record]) -> str | None:
    """What `detect` is for a format that is chosen, or known when its source is opened."""
    return None


def pieces(text: str, mark: re.Pattern[str]) -> Iterator[str | re.Match[str]]:
    """The text between marks, where there is any, and the marks, in order."""
    end = 0
    for found in mark.finditer(text):
        if found.start() > end:
            yield text[end : found.start()]
        yield found
        end = found.end()
    if end < len(text):
        yield text[end:]


def plain(text: str) -> TextPart:
    """Text of a turn. Raises StrayMark where it holds a mark that another format reads."""
    found = _MARKS.search(text) if "<" in text else None
    if found:
        raise StrayMark(
            f"the mark {found[0]!r} in the text {text[:60]!r}",
            expected="text: pictures and boxes are parts of their own",
            remedy="choose the --format that reads this mark, or take it out of the text",
        )
    return TextPart(text=text)


def worded(text: str) -> TextPart:
    """Text of a turn as `plain` takes it, what Qwen2-VL marks as a reference being its words."""
    return plain(_REFERENCE.sub(r"\1", text) if "<" in text else text)


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts, neighbouring texts as one."""
    whole: list[Part] = []
    run: list[TextPart] = []
    for part in parts:
        if part.type == "text":
            run.append(part)
            continue
        if run:
            whole.append(_joined(run))
            run = []
        whole.append(part)
    if run:
        whole.append(_joined(run))
    return tuple(whole)


def _joined(run: Sequence[TextPart]) -> TextPart:
    return run[0] if len(run) == 1 else TextPart(text="".join(part.text for part in run))


def refuse_unread(record: Record, keys: Iterable[str] = UNREAD_KEYS) -> None:
    """Raise UnreadKey where one of `keys` holds anything: it would be lost."""
    lost = sorted(key for key in keys if key in record and holds(record[key]))
    if lost:
        raise UnreadKey(
            f"the key {lost[0]!r} with {str(record[lost[0]])[:60]}",
            expected="a conversation of text, pictures and boxes",
            remedy="write these rows as samples, or take the key out",
        )


def holds(value: object) -> bool:
    """Whether a value says anything; that something is false does."""
    return value is not None and value != "" and value != [] and value != {}


def listed(value: object) -> list[object]:
    """A list as it is, nothing as no items, anything else as its only item."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
