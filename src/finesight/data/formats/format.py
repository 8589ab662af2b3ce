"""What a reader of a foreign format is, and what it may lean on while it reads a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finesight.data.boxes import Box, BoxForm, BoxFormat, BoxUnits, fitted, four_numbers
from finesight.data.case import Case
from finesight.data.pictures import Pictures
from finesight.data.rows import Record, Row
from finesight.data.sample import BoxPart, ImagePart, Part, TextPart
from finesight.errors import UserError

PICTURE_KEYS = ("image", "images")
UNREAD_KEYS = (
    *("video", "videos", "audio", "audios"),
    *("tools", "objects", "history", "rejected_response"),
)
"""Keys by which other programs add to a conversation what would be lost here."""

_MARKS = re.compile(
    r"<\|(?:vision|image|video|box|object_ref)_\w+\|>|<img>|<(?:box|quad)>\s*\(|<image>"
)


@dataclass(slots=True)
class Reading:
    """What one import knows while it reads: its pictures and what the user said about the rows.

    `clipped` counts boxes that stood out of their picture by no more than rounding explains.
    """

    pictures: Pictures
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    clipped: int = 0

    def form(self, usual: BoxForm) -> BoxForm:
        """How boxes are meant: what the user declared, else the format's `usual`."""
        return replace(
            usual,
            format=self.box_format or usual.format,
            units=self.box_units or usual.units,
        )

    def fit(self, box: Box, picture: Path, form: BoxForm) -> Box:
        """The box inside of its picture; see `fitted`."""
        inside = fitted(box, self.pictures.size(picture), form)
        self.clipped += inside != box
        return inside

    def asked(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The first user turn: its parts as they are, then the user's `--prompt`.

        A prompt after text starts a new line. Raises UserError when there is no word at all.
        """
        said = any(isinstance(part, TextPart) and part.text.strip() for part in parts)
        if self.prompt is None and not said:
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
        self.pictures: list[Path] = []

    def picture(self, value: object) -> ImagePart:
        """The picture that `value` means (see `Pictures.take`), now the most recent one."""
        self.pictures.append(self._reading.pictures.take(value))
        return ImagePart(image=str(self.pictures[-1]))

    def box(self, value: object, label: str | None, usual: BoxForm) -> BoxPart:
        """A box in the most recent picture, from four numbers in the declared or usual form."""
        if not self.pictures:
            raise UserError(
                f"the box {value} comes before any picture",
                expected="a picture before the box",
                remedy="put the picture first, or leave the row out",
            )
        reading, picture = self._reading, self.pictures[-1]
        form = reading.form(usual)
        exact = form.to_pixels(four_numbers(value), reading.pictures.size(picture))
        xyxy = reading.fit(exact, picture, form)
        return BoxPart(image=len(self.pictures) - 1, label=label, xyxy=xyxy)

    def need_one_picture(self) -> None:
        """Raise UserError unless it is plain which picture a box belongs to."""
        if len(self.pictures) != 1:
            raise UserError(
                f"boxes in a row with {len(self.pictures)} pictures",
                expected="one picture, so that it is plain where the boxes are",
                remedy="write the rows as samples, where each box names its picture",
            )


@dataclass(frozen=True, slots=True)
class Format:
    """One foreign format: how to know it and how to read a row of it.

    `detect` looks at the first records and says what it recognised, or None. `keys` are those by
    which an unknown file is compared; `takes` are the options that mean something here.
    """

    name: str
    looks: str
    keys: frozenset[str]
    detect: Callable[[Sequence[Record]], str | None]
    read: Callable[[Row, Reading], Case]
    takes: frozenset[str] = frozenset()


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
    """Text of a turn. Raises UserError where it holds a mark that another format reads."""
    found = _MARKS.search(text)
    if found:
        raise UserError(
            f"the mark {found[0]!r} in the text {text[:60]!r}",
            expected="text: pictures and boxes are parts of their own",
            remedy="choose the --format that reads this mark, or take it out of the text",
        )
    return TextPart(text=text)


def refuse_unread(record: Record, keys: Iterable[str] = UNREAD_KEYS) -> None:
    """Raise UserError where one of `keys` holds anything: it would be lost."""
    lost = sorted(key for key in keys if record.get(key))
    if lost:
        raise UserError(
            f"the key {lost[0]!r} with {str(record[lost[0]])[:60]}",
            expected="a conversation of text, pictures and boxes",
            remedy="write these rows as samples, or take the key out",
        )


def listed(value: object) -> list[object]:
    """A list as it is, nothing as no items, anything else as its only item."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
