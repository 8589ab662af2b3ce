"""Question of example commands and requests of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finesight.bounded_files import read_lines
from finesight.data.marked_prompt import count_marks, insert_images, remove_marks
from finesight.data.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.data.sample import ImagePart
from finesight.errors import Step, UserError
from finesight.manifest import PREDICTIONS_FOLDER

MAX_EXAMPLE_IMAGES = 8
"""Maximum number of images of an example question."""


class ExampleQuestion(NamedTuple):
    """Images, as files or `IMAGE`, and a prompt, or `TEXT`."""

    images: tuple[str, ...]
    prompt: str

    def build_step(self, run_or_model: str) -> Step:
        """Return the step that asks a model this question."""
        arguments: dict[str, object] = {
            "run_or_model": run_or_model,
            "images": [*self.images],
            "prompt": self.prompt,
        }
        if len(self.images) > 1:
            arguments["images_per_question"] = len(self.images)
        return Step("predict", arguments)


def build_example(run_dir: Path) -> ExampleQuestion:
    """Return the most frequent question of a run, or `TEXT` about the usual number of images."""
    return build_placeholder(_read_prompt_format(run_dir))


def _read_prompt_format(run_dir: Path) -> PromptFormat:
    """Return the form of the training questions; the default form without a readable manifest."""
    try:
        return PromptFormat.from_run(run_dir)
    except UserError:
        return DEFAULT_PROMPT_FORMAT


def build_placeholder(prompt_format: PromptFormat) -> ExampleQuestion:
    """Return the most frequent prompt of a format, or `TEXT` about the usual number of images."""
    num_images = 1
    if prompt_format.templates:
        num_images = min(prompt_format.templates[0].max_images, MAX_EXAMPLE_IMAGES)
        for prompt in prompt_format.prompts:
            return shorten_prompt(prompt, ["IMAGE"] * count_marks(prompt), prompt_format)
    return ExampleQuestion(("IMAGE",) * num_images, "TEXT")


def shorten_prompt(
    marked_prompt: str, images: Sequence[str], prompt_format: PromptFormat
) -> ExampleQuestion:
    """Return the shortest prompt that asks a question with marks of its images.

    The marks, and the white space around the text, are left out if the format adds them.
    """
    media = [ImagePart(image=str(index)) for index in range(len(images))]
    expected = insert_images(marked_prompt, media)
    text = remove_marks(marked_prompt)
    for prompt in (text.strip(), text):
        if prompt_format.build_content(prompt, media) == expected:
            return ExampleQuestion(tuple(images), prompt)
    return ExampleQuestion(tuple(images), marked_prompt if images else text)


def read_example(run_dir: Path) -> ExampleQuestion:
    """Return a question for example commands: that of the first validation prediction.

    Without predictions, it is the most frequent question of the training samples.
    """
    for name in ("after.jsonl", "before.jsonl"):
        with suppress(UserError, ValueError, LookupError, TypeError):
            lines = read_lines(run_dir / PREDICTIONS_FOLDER / name, expected="predictions")
            record = json.loads(next(lines, b"{}"))
            question = record["question"]
            # The first question with images has the first images of the sample.
            images = _as_list(record["image"])[: count_marks(question)]
            paths = [_simplify_path(str(path)) for path in images]
            return shorten_prompt(question, paths, _read_prompt_format(run_dir))
    return build_example(run_dir)


def _as_list(paths: Any) -> list[Any]:
    """Return the images of a prediction: a path, a list of several, or None."""
    if isinstance(paths, list):
        return paths
    return [] if paths is None else [paths]


def _simplify_path(path: str) -> str:
    """Normalize the path of an image, if the result names the same file."""
    # Paths of imported data contain "..", which the file system resolves differently after a link.
    normal = os.path.normpath(path)
    return normal if os.path.isfile(path) and os.path.isfile(normal) else path
