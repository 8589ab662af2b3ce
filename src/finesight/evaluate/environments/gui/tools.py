"""Tools of the synthetic window, in the coordinate frame of the model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from finesight.evaluate.environments.gui.window import (
    WINDOW_SIZE,
    GuiWindow,
    WindowLayout,
    WindowState,
)
from finesight.samples.frames import ImageSize, rescale

MAX_TEXT_LENGTH = 100
"""Maximum number of characters that are typed in a call."""


class Gui:
    """Environment with a window. Its reward is 1 if the window has the state of the goal."""

    def reset(self, meta: Mapping[str, Any], frames: Sequence[ImageSize]) -> None:
        """Start an episode.

        Args:
            meta: `window` with the labels of the window, and `goal` with its final state.
            frames: Height and width of the coordinate frame of the screenshot.
        """
        labels = dict(meta["window"])
        for name in ("fields", "items", "buttons"):
            labels[name] = tuple(labels[name])
        self._window = GuiWindow(WindowLayout(**labels))
        self._goal = WindowState(**meta["goal"])
        self._frame = frames[0]

    def click(self, x: float, y: float) -> Image.Image:
        """Click on a point of the window.

        Args:
            x: Horizontal position of the point.
            y: Vertical position of the point.
        """
        pixel_x, pixel_y, _, _ = rescale((x, y, x, y), self._frame, WINDOW_SIZE)
        self._window.click(pixel_x, pixel_y)
        return self._window.draw()

    def type_text(self, text: str) -> str | Image.Image:
        """Type a text into the field that was clicked last. It replaces the text of the field.

        Args:
            text: Text of one line.
        """
        if len(text) > MAX_TEXT_LENGTH or "\n" in text:
            return f"Error: text is not one line of at most {MAX_TEXT_LENGTH} characters"
        self._window.type_text(text)
        return self._window.draw()

    def scroll(self, direction: Literal["up", "down"]) -> Image.Image:
        """Scroll the list.

        Args:
            direction: Direction in which hidden items are.
        """
        self._window.scroll(direction)
        return self._window.draw()

    def get_reward(self) -> float:
        """Return 1 if the window has the state of the goal, else 0."""
        return float(self._window.state == self._goal)
