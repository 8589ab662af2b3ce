"""Example question for programs, which a worker process reads from the data of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finesight.app.line_counter import MAX_COUNTED_BYTES
from finesight.app.thumbnail import MAX_READ_SAMPLES
from finesight.errors import UserError
from finesight.files.worker_pool import JobOutput
from finesight.report.html import build_inline_image
from finesight.samples.corpus import open_sample_source
from finesight.samples.image_file import get_file
from finesight.samples.sample import ImagePart, TextPart
from finesight.vision.image_processing import load_image

MAX_IMAGES = 8
MAX_IMAGE_SIDE = 1568
IMAGE_QUALITY = 90

Content = list[dict[str, Any]]
"""Parts of a question of the API: texts, and images as URLs."""


def read_question(state: object, workspace: Path, file: Path) -> JobOutput:
    """Read the first question of a data file with its images as data URLs.

    Args:
        state: State of the worker process, which is not used.

    Raises:
        UserError: The first samples have no question about images of the workspace.
    """
    problem = UserError("no question", where=str(file), expected="samples with images")
    if file.stat().st_size > MAX_COUNTED_BYTES:  # It would be indexed first.
        raise problem
    source = open_sample_source(file)
    for index in range(min(len(source), MAX_READ_SAMPLES)):
        located = source.read_sample(index)
        question = next((one for one in located.sample.messages if one.role == "user"), None)
        parts = [] if question is None else question.content
        images = [part for part in parts if isinstance(part, ImagePart)]
        is_text = all(isinstance(part, ImagePart | TextPart) for part in parts)
        if not (images and is_text) or len(images) > MAX_IMAGES:
            continue
        content: Content = []
        for part in parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, ImagePart):
                path = located.resolve_path(part.image)
                if "\0" in str(path):
                    raise problem
                if not Path(os.path.realpath(get_file(path))).is_relative_to(workspace):
                    raise problem
                image = load_image(path, min_side=MAX_IMAGE_SIDE)
                url = build_inline_image(image, MAX_IMAGE_SIDE, IMAGE_QUALITY)["src"]
                content.append({"type": "image_url", "image_url": {"url": url}})
        return JobOutput(content)
    raise problem
