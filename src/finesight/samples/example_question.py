"""Question of example commands and requests of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finesight.errors import Step, UserError
from finesight.files.bounded_files import read_lines
from finesight.samples.corpus import load_corpus
from finesight.samples.image_file import resolve_content
from finesight.samples.marked_prompt import (
    REGION,
    count_marks,
    insert_images,
    remove_marks,
    write_marked_prompt,
)
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, PromptFormat
from finesight.samples.question_forms import find_question
from finesight.samples.sample import ImagePart, list_media_paths
from finesight.settings.manifest import PREDICTIONS_FOLDER, RECIPE_FILE
from finesight.settings.recipe import load_recipe
from finesight.settings.setting_types import is_url

MAX_EXAMPLE_IMAGES = 8
"""Maximum number of images of an example question."""

MAX_EXAMPLE_SAMPLES = 20
"""Maximum number of training samples that are searched for an example."""

MAX_COMMAND_CHARS = 2000
"""Maximum number of characters of a question in a command; Linux accepts 131,071 bytes."""


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


def _read_prompt_format(run_dir: Path) -> PromptFormat:
    """Return the form of the training questions; the default form without a readable manifest."""
    try:
        return PromptFormat.from_run(run_dir)
    except UserError:
        return DEFAULT_PROMPT_FORMAT


def build_placeholder(prompt_format: PromptFormat) -> ExampleQuestion:
    """Return the most frequent prompt of a format, or `TEXT` about the usual number of images."""
    if prompt_format.prompts:
        prompt = prompt_format.prompts[0]
        return shorten_prompt(prompt, ["IMAGE"] * count_marks(prompt), prompt_format)
    num_images = min(prompt_format.usual_num_images, MAX_EXAMPLE_IMAGES)
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

    Without predictions, it is that of a training sample; without readable samples, the most
    frequent one of the manifest.
    """
    prompt_format = _read_prompt_format(run_dir)
    example = _read_prediction(run_dir, prompt_format)
    if example is None:
        example = _read_training_question(run_dir, prompt_format)
    return example or build_placeholder(prompt_format)


def read_public_example(run_dir: Path) -> ExampleQuestion:
    """Return a question for reports, which other people read.

    A report contains predictions, but no training samples.
    """
    prompt_format = _read_prompt_format(run_dir)
    return _read_prediction(run_dir, prompt_format) or build_placeholder(prompt_format)


def _read_prediction(run_dir: Path, prompt_format: PromptFormat) -> ExampleQuestion | None:
    """Return the question of the first validation prediction, if it can be typed."""
    for name in ("after.jsonl", "before.jsonl"):
        with suppress(UserError, ValueError, LookupError, TypeError):
            lines = read_lines(run_dir / PREDICTIONS_FOLDER / name, expected="predictions")
            record = json.loads(next(lines, b"{}"))
            question = record["question"]
            if not _can_be_typed(question):
                continue
            # The first question with images has the first images of the sample.
            images = _as_list(record["image"])[: count_marks(question)]
            paths = [_simplify_path(str(path)) for path in images]
            return shorten_prompt(question, paths, prompt_format)
    return None


def _read_training_question(run_dir: Path, prompt_format: PromptFormat) -> ExampleQuestion | None:
    """Return the first training question that can be typed, about files that can be read."""
    with suppress(UserError):
        # One file is enough: others may be large.
        files = load_recipe(run_dir / RECIPE_FILE).data.train[:1]
        if any(is_url(file.path) for file in files):
            return None
        corpus = load_corpus(files, require_answer=False)
        for index in range(min(len(corpus), MAX_EXAMPLE_SAMPLES)):
            located = corpus[index]
            content = find_question(located.sample)
            if content is None:
                continue
            names: list[str] = []
            for part in content:
                names += list_media_paths(part)
            marked_prompt = write_marked_prompt(content)
            # Frames of a video are several files for one mark.
            if len(names) > MAX_EXAMPLE_IMAGES or count_marks(marked_prompt) != len(names):
                continue
            paths = [located.resolve_path(name) for name in names]
            if _can_be_typed(marked_prompt) and all(map(_is_readable, paths)):
                return shorten_prompt(marked_prompt, [*map(str, paths)], prompt_format)
    return None


def _can_be_typed(marked_prompt: str) -> bool:
    return REGION not in marked_prompt and len(marked_prompt) <= MAX_COMMAND_CHARS


def _is_readable(path: Path) -> bool:
    """Return whether a path is a file or an image in a container."""
    try:
        content = resolve_content(path)
        return not isinstance(content, Path) or content.is_file()
    except (OSError, UserError):
        return False


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
