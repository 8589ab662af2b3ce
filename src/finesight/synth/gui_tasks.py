"""Synthetic tasks in a window: press a button, fill in a field, or choose an item of a list."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finesight.evaluate.environments.gui.window import (
    WINDOW_SIZE,
    GuiWindow,
    WindowLayout,
    WindowState,
)
from finesight.files.storage import write_folder
from finesight.samples.frames import FRAME_1000, ImageSize, rescale, round_to_size
from finesight.samples.sample import ToolCallPart, write_samples
from finesight.synth.tickets import split_words
from finesight.synth.tool_task import ToolTask, build_task_sample

FINAL_ANSWER = "Done."

_TITLES = ("Orders", "Stock", "Market", "Kitchen", "Garden", "Garage")
_FIELDS = ("Name", "Amount", "City", "Date", "Price", "Total")
_BUTTONS = ("OK", "Cancel", "Save", "Open", "Print", "Send", "Help", "Close")
_ITEMS = split_words("kiwi apple pear plum lemon mango cherry grape peach melon lime fig")
_KINDS = ("press", "enter", "choose")


def write_gui_tasks(
    target: Path, count: int, seed: int, frame: ImageSize = FRAME_1000
) -> list[ToolTask]:
    """Write screenshots, and their tasks as `data.jsonl`, for the environment `gui`.

    `meta` of a sample has `window`, the labels of the window, and `goal`, its final state. The
    output is determined by the seed. A larger count extends a smaller one.

    Args:
        frame: Height and width of the coordinate frame of the calls.

    Returns:
        The tasks, each with the calls of its shortest solution.

    Raises:
        UserError: `target` exists.
    """
    tasks = []
    with write_folder(target) as folder:
        (folder / "images").mkdir()
        for index in range(count):
            # A text seed is hashed: adjacent indices give independent samples.
            rng = random.Random(f"gui {seed} {index}")
            layout = sample_layout(rng)
            question, goal = sample_goal(layout, rng)
            window = GuiWindow(layout)
            name = f"images/{index:05}.png"
            window.draw().save(folder / name)
            meta = {"window": asdict(layout), "goal": goal.to_dict()}
            sample = build_task_sample(f"gui-{index:05}", name, question, FINAL_ANSWER, meta)
            tasks.append(ToolTask(sample, solve(window, goal, frame)))
        write_samples(folder / "data.jsonl", [task.sample for task in tasks])
    return tasks


def sample_layout(rng: random.Random) -> WindowLayout:
    """Sample the labels of a window."""
    return WindowLayout(
        title=rng.choice(_TITLES),
        fields=tuple(rng.sample(_FIELDS, rng.randint(1, 2))),
        items=tuple(rng.sample(_ITEMS, rng.randint(5, 7))),
        buttons=tuple(rng.sample(_BUTTONS, 3)),
        is_mirrored=rng.random() < 0.5,
    )


def sample_goal(layout: WindowLayout, rng: random.Random) -> tuple[str, WindowState]:
    """Sample a task in a window, and the state of the window after it."""
    kind = rng.choice(_KINDS)
    button = rng.choice(layout.buttons)
    if kind == "press":
        return f"Press {button}.", WindowState(pressed=button)
    if kind == "choose":
        item = rng.choice(layout.items)
        return f"Choose the item {item} in the list.", WindowState(selected=item)
    field = rng.choice(layout.fields)
    value = str(rng.randrange(10, 1000))
    question = f"Enter {value} in the field {field} and press {button}."
    return question, WindowState(texts={field: value}, pressed=button)


def solve(window: GuiWindow, goal: WindowState, frame: ImageSize) -> Sequence[ToolCallPart]:
    """Return the calls that bring a new window to a state.

    Scrolling is applied to the window.
    """
    calls = []
    for name, text in goal.texts.items():
        calls.append(build_click(window, name, frame))
        calls.append(ToolCallPart(name="type_text", arguments={"text": text}))
    if goal.selected:
        if window.find_box(goal.selected) is None:
            window.scroll("down")
            calls.append(ToolCallPart(name="scroll", arguments={"direction": "down"}))
        calls.append(build_click(window, goal.selected, frame))
    if goal.pressed:
        calls.append(build_click(window, goal.pressed, frame))
    return calls


def build_click(window: GuiWindow, name: str, frame: ImageSize) -> ToolCallPart:
    """Build a click on the center of a visible field, item or button."""
    box = window.find_box(name)
    assert box is not None, f"{name} is not visible"
    left, top, right, bottom = box
    x = (left + right) / 2
    y = (top + bottom) / 2
    center = round_to_size(rescale((x, y, x, y), WINDOW_SIZE, frame), frame)
    return ToolCallPart(name="click", arguments={"x": center[0], "y": center[1]})
