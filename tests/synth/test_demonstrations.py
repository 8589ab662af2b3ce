"""Demonstrations: conversations with the results that the environment returns."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.evaluate.environment import Environment
from finesight.model_folder import ModelFolder
from finesight.samples.frames import rescale
from finesight.samples.sample import ImagePart, LocatedSample, ToolCallPart, read_samples
from finesight.synth.demonstrations import write_demonstrations
from finesight.synth.gui_tasks import write_gui_tasks
from finesight.synth.small_words import IMAGE_SIDE, write_small_words
from finesight.synth.tool_task import ToolTask

Write = Callable[..., list[ToolTask]]


@pytest.fixture(scope="module")
def zoom(tmp_path_factory):
    with Environment("image_zoom_in_tool", tmp_path_factory.mktemp("zoom"), 30.0) as environment:
        yield environment


@pytest.fixture(scope="module")
def gui(tmp_path_factory):
    with Environment("gui", tmp_path_factory.mktemp("gui"), 30.0) as environment:
        yield environment


def open_images(sample: Any, folder: Path) -> list[Image.Image]:
    images = []
    for part in sample.iter_parts():
        if isinstance(part, ImagePart):
            with Image.open(folder / part.image) as image:
                images.append(image.convert("RGB"))
    return images


@pytest.mark.parametrize("frame", [(1000, 1000), (224, 224)])
def test_small_words_are_enlarged(zoom, frame, tmp_path):
    folder = tmp_path / "words"
    tasks = write_small_words(folder, 4, 0, frame)
    path = write_demonstrations(folder, tasks, zoom, frame)
    for task, sample in zip(tasks, read_samples(path), strict=True):
        question, called, result, answer = sample.messages
        assert [message.role for message in sample.messages] == [
            *("user", "assistant", "tool", "assistant")
        ]
        assert (question, answer) == task.sample.messages
        assert called.content == tuple(task.calls)
        assert len(result.content) == 1
        image, crop = open_images(sample, folder)
        corners = rescale(task.calls[0].arguments["bbox_2d"], frame, (IMAGE_SIDE, IMAGE_SIDE))
        left, top, right, bottom = corners
        # The crop has the same shares of paper and ink, enlarged at least eight times.
        assert crop.width >= 8 * (right - left) * 0.9
        assert crop.height >= 8 * (bottom - top) * 0.9
        assert crop.width * crop.height >= 256 * 32 * 32
        paper = np.asarray(image)[0, 0].astype(int)
        ink = np.abs(np.asarray(crop, dtype=int) - paper).sum(axis=-1) > 100
        assert 0.03 < ink.mean() < 0.5


def test_training_covers_calls_and_answer(zoom, gui, tmp_path):
    """Tool definitions, results and questions are no targets."""
    renderer = NativeRenderer(ModelFolder(create_tiny_model(tmp_path / "tiny")))
    parts: list[tuple[Write, Environment]] = [(write_small_words, zoom), (write_gui_tasks, gui)]
    for number, (write, environment) in enumerate(parts):
        folder = tmp_path / str(number)
        tasks = write(folder, 5, 0)
        samples = read_samples(write_demonstrations(folder, tasks, environment))
        for task, sample in zip(tasks, samples, strict=True):
            assert sample.tools == environment.tools
            tokenized = renderer.tokenize(LocatedSample(sample, folder))
            ids = tokenized.ids_T[tokenized.loss_mask_T].tolist()
            text = renderer.tokenizer.decode(ids, skip_special_tokens=False)
            expected = [call.to_text() for call in task.calls]
            (answer,) = task.sample.messages[-1].content
            expected.append(answer.text)
            assert text.replace("<|im_end|>\n", "<|im_end|>").split("<|im_end|>")[:-1] == expected


def test_screenshots_follow_the_calls(gui, tmp_path):
    folder = tmp_path / "gui"
    tasks = write_gui_tasks(folder, 12, 0)
    path = write_demonstrations(folder, tasks, gui)
    for task, sample in zip(tasks, read_samples(path), strict=True):
        assert len(sample.messages) == 2 + 2 * len(task.calls)
        images = [image.tobytes() for image in open_images(sample, folder)]
        assert len(set(images)) == 1 + len(task.calls)


def test_environment_receives_seed_and_boxes(tmp_path):
    """Also at a second try, after the environment failed."""
    file = tmp_path / "seeded.py"
    file.write_text(SEEDED)
    tasks = write_small_words(tmp_path / "words", 2, 0)
    tasks = [replace(task, calls=[ToolCallPart(name="look", arguments={})]) for task in tasks]
    (tmp_path / "words" / "results").mkdir()
    with Environment(f"{file}:Seeded", None, 30.0) as environment:
        samples = read_samples(write_demonstrations(tmp_path / "words", tasks, environment))
    texts = [json.loads(sample.messages[2].content[0].text) for sample in samples]
    assert texts[0][0] != texts[1][0]
    assert texts[0][1] == []


SEEDED = """
import json

class Seeded:
    def reset(self, seed, boxes):
        self.values = [seed, boxes]

    def look(self) -> str:
        '''Look.'''
        return json.dumps(self.values)
"""


def test_wrong_demonstrations_are_refused(zoom, gui, tmp_path):
    words = write_small_words(tmp_path / "words", 1, 0)
    mistake = ToolCallPart(name="image_zoom_in_tool", arguments={"bbox_2d": [1, 2, 3]})
    with pytest.raises(ValueError, match="word-00000: image_zoom_in_tool: Error: bbox_2d"):
        write_demonstrations(tmp_path / "words", [replace(words[0], calls=[mistake])], zoom)
    tasks = write_gui_tasks(tmp_path / "gui", 1, 0)
    with pytest.raises(ValueError, match="gui-00000: the calls have the reward 0"):
        write_demonstrations(tmp_path / "gui", [replace(tasks[0], calls=[])], gui)
