"""The synthetic window reacts to input, and the solution of each task reaches its goal."""

import random

import pytest

from finesight.evaluate.environments.gui.window import (
    WINDOW_SIZE,
    GuiWindow,
    WindowLayout,
    WindowState,
)
from finesight.samples.frames import rescale
from finesight.samples.sample import read_samples
from finesight.synth.gui_tasks import sample_goal, sample_layout, solve, write_gui_tasks

LAYOUT = WindowLayout(
    title="Orders",
    fields=("Amount", "City"),
    items=("kiwi", "apple", "pear", "plum", "lemon", "mango"),
    buttons=("OK", "Cancel", "Save"),
    is_mirrored=False,
)


def click(window, name):
    left, top, right, bottom = window.find_box(name)
    window.click((left + right) / 2, (top + bottom) / 2)


def test_window_has_the_state_of_its_input():
    window = GuiWindow(LAYOUT)
    window.type_text("nowhere")
    window.click(1, 1)
    window.click(float("nan"), 40)
    assert window.state == WindowState()
    click(window, "City")
    window.type_text("Rome")
    click(window, "Amount")
    window.type_text("4")
    window.type_text("42")
    click(window, "kiwi")
    assert window.find_box("mango") is None
    window.scroll("down")
    assert window.find_box("kiwi") is None
    click(window, "mango")
    assert window.state == WindowState({"City": "Rome", "Amount": "42"}, "mango", "")
    click(window, "Save")
    expected = WindowState({"City": "Rome", "Amount": "42"}, "mango", "Save")
    assert window.state == expected
    click(window, "OK")
    click(window, "plum")
    click(window, "City")
    window.type_text("late")
    assert window.state == expected
    window.scroll("up")
    window.scroll("up")
    assert window.find_box("kiwi") is not None


def test_field_without_text_is_no_input():
    window = GuiWindow(LAYOUT)
    click(window, "City")
    window.type_text("Rome")
    window.type_text("")
    assert window.state == WindowState()


def test_screenshots_show_the_state():
    window = GuiWindow(LAYOUT)
    images = [window.draw()]
    for name in ("Amount", "kiwi", "Save"):
        click(window, name)
        images.append(window.draw())
        if name == "Amount":
            window.type_text("42")
            images.append(window.draw())
    window.scroll("down")
    images.append(window.draw())
    assert all(image.size == WINDOW_SIZE[::-1] and image.mode == "RGB" for image in images)
    assert len({image.tobytes() for image in images}) == len(images)


def test_boxes_are_inside_and_disjoint():
    for number in range(30):
        layout = sample_layout(random.Random(number))
        boxes = [box for _, _, box in GuiWindow(layout).iter_boxes()]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= WINDOW_SIZE[1]
            assert 24 < top < bottom <= WINDOW_SIZE[0]
            for other in boxes[:index]:
                assert (
                    right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                )


@pytest.mark.parametrize("frame", [(1000, 1000), (224, 280)])
def test_solutions_reach_their_goal(frame):
    lengths = set()
    for number in range(100):
        rng = random.Random(number)
        layout = sample_layout(rng)
        _, goal = sample_goal(layout, rng)
        window = GuiWindow(layout)
        calls = solve(GuiWindow(layout), goal, frame)
        for call in calls:
            values = call.arguments
            assert window.state != goal
            if call.name == "click":
                x, y, _, _ = rescale((values["x"], values["y"]) * 2, frame, WINDOW_SIZE)
                window.click(x, y)
            else:
                getattr(window, call.name)(**values)
        assert window.state == goal
        lengths.add(len(calls))
    assert lengths == {1, 2, 3}


def test_more_tasks_extend_fewer(tmp_path):
    few = write_gui_tasks(tmp_path / "few", 3, seed=5)
    more = write_gui_tasks(tmp_path / "more", 5, seed=5)
    assert more[:3] == few
    samples = read_samples(tmp_path / "more" / "data.jsonl")
    assert [sample.id for sample in samples] == [task.sample.id for task in more]
    for name in ("00000", "00001", "00002"):
        path = f"images/{name}.png"
        assert (tmp_path / "few" / path).read_bytes() == (tmp_path / "more" / path).read_bytes()
