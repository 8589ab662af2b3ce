"""A synthetic window with text fields, a list and buttons: its state and its screenshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from PIL import Image, ImageDraw

from finesight.vision.drawing import load_builtin_font

WINDOW_SIZE = (224, 280)
"""Height and width of a screenshot in pixels."""

NUM_VISIBLE_ITEMS = 4

NUM_SCROLLED_ITEMS = 3
"""Number of items by which the list scrolls."""

PixelBox = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

_COLUMNS = (8, 148)
"""Left sides of the columns with the fields and the list."""

_COLUMN_WIDTH = 124
_TOP = 32
_TITLE_HEIGHT = 24
_FIELD_STEP = 50
_LABEL_HEIGHT = 20
_FIELD_HEIGHT = 24
_ITEM_HEIGHT = 26
_BUTTON_TOP = 180
_BUTTON_WIDTH = 84
_BUTTON_STEP = 90
_BUTTON_HEIGHT = 32
_SCROLL_BAR_WIDTH = 6
_FONT_SIZE = 15

_BORDER = (110, 110, 115)
_INK = (20, 20, 25)
_FACE = (226, 226, 230)
_MARKED = (175, 205, 245)
_TITLE_COLOR = (40, 70, 120)
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class WindowLayout:
    """Labels of a window.

    Attributes:
        items: Items of the list, of which `NUM_VISIBLE_ITEMS` are visible.
        is_mirrored: Whether the list is on the left.
    """

    title: str
    fields: tuple[str, ...]
    items: tuple[str, ...]
    buttons: tuple[str, ...]
    is_mirrored: bool


@dataclass(frozen=True)
class WindowState:
    """Input of a user into a window.

    Attributes:
        texts: Texts of the fields that have one, by name.
        selected: Selected item of the list.
        pressed: Pressed button. After it, the window ignores further input.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    selected: str = ""
    pressed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return asdict(self)


class GuiWindow:
    """A window that reacts to clicks, texts and scrolling, and draws its screenshot."""

    def __init__(self, layout: WindowLayout) -> None:
        self.layout = layout
        self.state = WindowState()
        self._focus = ""
        self._offset = 0

    def click(self, x: float, y: float) -> None:
        """Click on a point in pixels: focus a field, select an item or press a button."""
        for kind, name, (left, top, right, bottom) in self.iter_boxes():
            if not (left <= x < right and top <= y < bottom) or self.state.pressed:
                continue
            if kind == "field":
                self._focus = name
            elif kind == "item":
                self.state = replace(self.state, selected=name)
            else:
                self.state = replace(self.state, pressed=name)

    def type_text(self, text: str) -> None:
        """Replace the text of the field that was clicked last; nothing happens without one."""
        if self._focus and not self.state.pressed:
            texts = {**self.state.texts, self._focus: text}
            if not text:
                del texts[self._focus]
            self.state = replace(self.state, texts=texts)

    def scroll(self, direction: Literal["up", "down"]) -> None:
        """Scroll the list by `NUM_SCROLLED_ITEMS`."""
        step = NUM_SCROLLED_ITEMS
        if direction == "up":
            step = -step
        last = max(0, len(self.layout.items) - NUM_VISIBLE_ITEMS)
        self._offset = min(max(self._offset + step, 0), last)

    def iter_boxes(self) -> Iterator[tuple[Literal["field", "item", "button"], str, PixelBox]]:
        """Yield kind, label and box of all fields, visible items and buttons."""
        field_left, list_left = _COLUMNS
        if self.layout.is_mirrored:
            list_left, field_left = _COLUMNS
        for number, name in enumerate(self.layout.fields):
            top = _TOP + _FIELD_STEP * number + _LABEL_HEIGHT
            yield "field", name, (field_left, top, field_left + _COLUMN_WIDTH, top + _FIELD_HEIGHT)
        visible = self.layout.items[self._offset : self._offset + NUM_VISIBLE_ITEMS]
        for number, name in enumerate(visible):
            top = _TOP + _ITEM_HEIGHT * number
            right = list_left + _COLUMN_WIDTH - _SCROLL_BAR_WIDTH
            yield "item", name, (list_left, top, right, top + _ITEM_HEIGHT)
        for number, name in enumerate(self.layout.buttons):
            left = _COLUMNS[0] + _BUTTON_STEP * number
            yield (
                "button",
                name,
                (
                    left,
                    _BUTTON_TOP,
                    left + _BUTTON_WIDTH,
                    _BUTTON_TOP + _BUTTON_HEIGHT,
                ),
            )

    def find_box(self, name: str) -> PixelBox | None:
        """Return the box of a field, item or button; None if it is not visible."""
        for _, label, box in self.iter_boxes():
            if label == name:
                return box
        return None

    def draw(self) -> Image.Image:
        """Draw the screenshot as an RGB image."""
        height, width = WINDOW_SIZE
        image = Image.new("RGB", (width, height), (244, 244, 246))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, width, _TITLE_HEIGHT), _TITLE_COLOR)
        _draw_text(draw, self.layout.title, (8, 0, width, _TITLE_HEIGHT), _WHITE)
        for kind, name, box in self.iter_boxes():
            left, top, right, bottom = box
            if kind == "field":
                _draw_text(draw, name, (left, top - _LABEL_HEIGHT, right, top), _INK)
                border = _BORDER
                if name == self._focus:
                    border = _TITLE_COLOR
                draw.rectangle((left, top, right - 1, bottom - 1), _WHITE, border, 2)
                _draw_text(draw, self.state.texts.get(name, ""), (left + 5, *box[1:]), _INK)
                continue
            is_marked = name in (self.state.selected, self.state.pressed)
            if kind == "item":
                fill = _MARKED if is_marked else _WHITE
                draw.rectangle((left, top, right - 1, bottom - 1), fill)
                _draw_text(draw, name, (left + 6, *box[1:]), _INK)
            else:
                fill = _MARKED if is_marked else _FACE
                draw.rectangle((left, top, right - 1, bottom - 1), fill, _BORDER)
                _draw_text(draw, name, (left + 8, *box[1:]), _INK)
        self._draw_scroll_bar(draw)
        return image

    def _draw_scroll_bar(self, draw: ImageDraw.ImageDraw) -> None:
        left = _COLUMNS[0 if self.layout.is_mirrored else 1] + _COLUMN_WIDTH - _SCROLL_BAR_WIDTH
        right = left + _SCROLL_BAR_WIDTH
        length = _ITEM_HEIGHT * NUM_VISIBLE_ITEMS
        draw.rectangle((left, _TOP, right, _TOP + length - 1), _FACE)
        num_items = max(len(self.layout.items), NUM_VISIBLE_ITEMS)
        start = _TOP + length * self._offset // num_items
        stop = start + length * NUM_VISIBLE_ITEMS // num_items
        draw.rectangle((left, start, right, stop - 1), _BORDER)


def _draw_text(
    draw: ImageDraw.ImageDraw, text: str, box: PixelBox, color: tuple[int, int, int]
) -> None:
    """Draw a text at the left of a box, in its vertical center."""
    left, top, _, bottom = box
    draw.text((left, (top + bottom) // 2), text, color, load_builtin_font(_FONT_SIZE), anchor="lm")
