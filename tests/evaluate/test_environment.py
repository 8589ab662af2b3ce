"""Tools of environments: their definitions, and the crops of the zoom tool."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finesight.errors import UserError
from finesight.evaluate.environment import Environment, EpisodeError, ToolResult
from finesight.evaluate.environment_worker import parse_docstring
from finesight.evaluate.generation_eval import find_episode_settings

FILE = """
from __future__ import annotations
from typing import Literal
from PIL import Image

class Mouse:
    def __init__(self):
        self.calls = []

    def reset(self, **values):
        self.values = values

    def click(self, x: int, button: Literal["left", "right"] = "left", schema: str | None = None):
        '''Click somewhere.

        It may have an effect.

        Args:
            x (int): Column
                of the pixel.
            button: Button
              of the mouse: any.

        Returns:
            The calls.
        '''
        self.calls.append((x, button, schema))
        image = Image.new("RGBA", (3, 2), (9, 8, 7, 0))
        return [repr(self.calls), {"type": "image", "image": image}]

    def _secret(self):
        pass

    def get_reward(self):
        return None
"""


@pytest.mark.parametrize("name", ["mouse.txt:Mouse", "mouse.py:", "python:mouse.py:Mouse", "zoom"])
def test_only_classes_of_python_files_are_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("mouse.py", "mouse.txt", "python:mouse.py"):
        (tmp_path / file).write_text("open('executed', 'w').close()")
    with pytest.raises(UserError, match="no environment"):
        Environment(name, None, 30.0)
    with pytest.raises(UserError, match="no environment"):
        find_episode_settings("finesight-tiny", name)
    assert not (tmp_path / "executed").exists()


def test_tools_are_the_public_methods(tmp_path):
    (tmp_path / "mouse.py").write_text(FILE)
    with Environment(f"{tmp_path / 'mouse.py'}:Mouse", tmp_path, 30.0) as environment:
        (tool,) = environment.tools
        session = environment.start_episode({"id": "a"}, [])
        first = session.call_tool("click", {"x": 3})
        second = session.call_tool("click", {"x": "4", "button": "right", "schema": "s"})
        wrong = session.call_tool("click", {"button": "middle", "extra": 1})
        missing = session.call_tool("_secret", {})
        other = environment.start_episode({"id": "b"}, [])
        fresh = other.call_tool("click", {"x": 1})
        assert session.get_reward() is None
    function = tool["function"]
    assert function["name"] == "click"
    assert function["description"] == "Click somewhere.\n\nIt may have an effect."
    assert function["parameters"]["required"] == ["x"]
    properties = function["parameters"]["properties"]
    assert properties["x"] == {"type": "integer", "description": "Column of the pixel."}
    assert properties["button"]["enum"] == ["left", "right"]
    assert properties["button"]["description"] == "Button of the mouse: any."
    assert [*properties] == ["x", "button", "schema"]
    assert first.blocks[0] == "[(3, 'left', None)]"
    image = first.blocks[1]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (255, 255, 255))
    assert second.blocks[0] == "[(3, 'left', None), (4, 'right', 's')]"
    assert fresh.blocks[0] == "[(1, 'left', None)]"
    assert wrong.is_mistake
    (text,) = wrong.blocks
    assert isinstance(text, str)
    assert all(word in text for word in ("x: Field required", "button: ", "extra: "))
    assert missing == ToolResult(["Error: no tool '_secret'; the tools are click"], is_mistake=True)


SEEDS = """
class {name}:
    def reset(self, {arguments}):
        self.seed = {value}

    def show(self, title: dict = {{"title": "Mr", "type": 1}}) -> str:
        '''Show the seed.'''
        return str(self.seed)
"""


@pytest.mark.parametrize(
    ("arguments", "value", "expected"),
    [
        ("id, seed", "seed", "7"),
        ("id", "None", "None"),
        ("**values", "sorted(values)", "['id', 'images']"),
        ("seed, **values", "seed, sorted(values)", "(7, ['id', 'images'])"),
    ],
)
def test_reset_receives_a_seed_if_it_declares_it(arguments, value, expected, tmp_path):
    file = tmp_path / "seeds.py"
    file.write_text(SEEDS.format(name="Seeds", arguments=arguments, value=value))
    with Environment(f"{file}:Seeds", tmp_path, 30.0) as environment:
        assert not environment.has_reward
        session = environment.start_episode({"id": "a", "seed": 7}, [])
        assert session.call_tool("show", {}).blocks == [expected]
    parameters = environment.tools[0]["function"]["parameters"]
    assert parameters["properties"]["title"]["default"] == {"title": "Mr", "type": 1}
    assert [*parameters["properties"]["title"]] == ["type", "additionalProperties", "default"]


PROGRAMS = """
import os, subprocess, sys

class Programs:
    def reset(self):
        pass

    def start(self, crashes: bool) -> str:
        '''Start a program.

        Args:
            crashes: Whether this process ends.
        '''
        program = "import signal as s, time; s.signal(s.SIGIO, s.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", program])
        with open({file!r}, "w") as file:
            file.write(str(child.pid))
        if crashes:
            os._exit(1)
        return "started"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of lifelines")
@pytest.mark.parametrize("crashes", [False, True])
def test_programs_end_with_their_episode(crashes, tmp_path):
    """Also if the process that started them has crashed, and without harm to other episodes."""
    file = tmp_path / "programs.py"
    file.write_text(PROGRAMS.format(file=str(tmp_path / "pid")))
    with Environment(f"{file}:Programs", tmp_path, 30.0) as environment:
        session = environment.start_episode({}, [])
        other = environment.start_episode({}, [])
        with pytest.raises(EpisodeError) if crashes else nullcontext():
            session.call_tool("start", {"crashes": crashes})
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
        session.close()
        while is_running(pid):
            time.sleep(0.01)
        assert not other.call_tool("start", {"crashes": False}).is_mistake
        pid = int((tmp_path / "pid").read_text())
    while is_running(pid):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_docstrings_without_arguments():
    assert parse_docstring("Run.") == ("Run.", {})
    assert parse_docstring("Run.\n\nRaises:\n    ValueError: Never.") == ("Run.", {})


@pytest.mark.parametrize(
    ("frame", "box", "corners", "size"),
    [
        ((1000, 1000), [100, 200, 600, 700], (40, 40, 240, 140), (736, 384)),
        # Pixels of the resized image, as in Qwen2.5-VL.
        ((400, 800), [80, 80, 480, 280], (40, 40, 240, 140), (736, 384)),
        # Small sides grow to 32 pixels within the image.
        ((1000, 1000), [0, 0, 10, 10], (0, 0, 32, 32), (512, 512)),
        ((1000, 1000), [990, 980, 2000, 2000], (368, 168, 400, 200), (512, 512)),
        ((1000, 1000), [500, 500, 510, 500.5], (186, 85, 218, 117), (512, 512)),
    ],
)
def test_zoom_crops_the_box_in_the_frame_of_the_family(frame, box, corners, size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    result = zoom(tmp_path / "a.png", frame, {"bbox_2d": box, "label": "", "img_idx": 0})
    (crop,) = result.blocks
    assert isinstance(crop, Image.Image)
    assert crop.size == size
    assert crop == image.crop(corners).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"img_idx": 1}, "img_idx is 1, but there are 1 images"),
        ({"img_idx": 0.5}, "img_idx is 0.5"),
        ({"bbox_2d": [5, 5, 5, 9]}, "empty"),
        ({"bbox_2d": [9, 9, 5, 5]}, "empty"),
        ({"bbox_2d": [2000, 0, 3000, 9]}, "empty or outside"),
        ({"bbox_2d": [1, 2, 3]}, "at least 4 items"),
    ],
)
def test_zoom_explains_mistakes(arguments, problem, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    given = {"bbox_2d": [0, 0, 500, 500], "label": "", "img_idx": 0} | arguments
    (text,) = zoom(tmp_path / "a.png", (1000, 1000), given).blocks
    assert isinstance(text, str)
    assert text.startswith("Error: ")
    assert problem in text


def zoom(path: Path, frame: tuple[int, int], arguments: dict[str, object]) -> ToolResult:
    with Environment("image_zoom_in_tool", path.parent, 30.0) as environment:
        session = environment.start_episode({"frames": [frame]}, [path])
        return session.call_tool("image_zoom_in_tool", arguments)


GUI_ROW = {
    "meta": {
        "window": {
            "title": "Orders",
            "fields": ["Amount"],
            "items": ["kiwi", "apple", "pear", "plum", "lemon", "mango"],
            "buttons": ["OK", "Save", "Cancel"],
            "is_mirrored": False,
        },
        "goal": {"texts": {"Amount": "42"}, "selected": "", "pressed": "OK"},
    }
}


@pytest.fixture(scope="module")
def gui(tmp_path_factory):
    with Environment("gui", tmp_path_factory.mktemp("gui"), 30.0) as environment:
        yield environment


@pytest.mark.parametrize("frame", [(1000, 1000), (448, 560)])
def test_gui_is_used_in_the_frame_of_the_family(gui, frame):
    """Centers of the field Amount and the button OK in thousandths, and in resized pixels."""
    height, width = frame
    field = {"x": 0.25 * width, "y": 0.286 * height}
    button = {"x": 0.18 * width, "y": 0.875 * height}
    session = gui.start_episode(GUI_ROW | {"frames": [frame]}, [])
    screenshots = []
    for name, arguments in (
        ("click", field),
        ("type_text", {"text": "42"}),
        ("scroll", {"direction": "down"}),
        ("click", button),
    ):
        assert session.get_reward() == 0.0
        (image,) = session.call_tool(name, arguments).blocks
        assert isinstance(image, Image.Image)
        assert image.size == (280, 224)
        screenshots.append(image.tobytes())
    assert len(set(screenshots)) == 4
    assert session.get_reward() == 1.0


def test_gui_needs_exactly_the_goal(gui):
    session = gui.start_episode(GUI_ROW | {"frames": [(1000, 1000)]}, [])
    session.call_tool("click", {"x": 180, "y": 875})  # OK, before the text
    session.call_tool("click", {"x": 250, "y": 286})
    session.call_tool("type_text", {"text": "42"})
    assert session.get_reward() == 0.0


def test_gui_explains_mistakes(gui):
    session = gui.start_episode(GUI_ROW | {"frames": [(1000, 1000)]}, [])
    assert session.call_tool("scroll", {"direction": "left"}).is_mistake
    assert session.call_tool("click", {"x": 1}).is_mistake
    for text in ("x" * 101, "a\nb"):
        (result,) = session.call_tool("type_text", {"text": text}).blocks
        assert result == "Error: text is not one line of at most 100 characters"
    with pytest.raises(EpisodeError, match="KeyError: 'window'"):
        gui.start_episode({"meta": {}, "frames": [(1, 1)]}, [])
