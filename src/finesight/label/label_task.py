"""Inputs of a labelling session: samples, prompt, and kind of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finesight.data.corpus import load_corpus
from finesight.data.image_header import IMAGE_SUFFIXES
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    read_samples,
)
from finesight.errors import UserError, suggest_similar_path
from finesight.manifest import RECIPE_FILE
from finesight.recipe import load_recipe

AnswerKind = Literal["text", "fields", "classes", "boxes"]

MAX_EXAMPLES = 500
"""Number of samples by which prompt and kind of the answers are detected."""

MAX_CLASSES = 30
"""Maximum number of different answers that count as classes."""

MIN_CLASS_REPEATS = 3
"""Minimum mean number of samples per class."""


@dataclass(frozen=True, slots=True)
class LabelTask:
    """Prompt and kind of the answers of a session.

    Attributes:
        prompt: Question about each image; None if it is unknown.
        choices: Class names: the answers, or the labels of boxes. Empty for free text.
        template: JSON object with empty values for images without a suggestion; empty without one.
    """

    kind: AnswerKind = "text"
    prompt: str | None = None
    choices: tuple[str, ...] = ()
    template: str = ""


def read_run_examples(run_or_model: str) -> list[LocatedSample]:
    """Return the first training samples of a run; none for a model or if the data was moved."""
    path = Path(run_or_model) / RECIPE_FILE
    if not path.is_file():
        return []
    try:
        corpus = load_corpus(load_recipe(path).data.train)
        return [corpus[index] for index in range(min(MAX_EXAMPLES, len(corpus)))]
    except UserError:
        return []


def detect_task(
    examples: Sequence[LocatedSample],
    *,
    prompt: str | None = None,
    kind: AnswerKind | None = None,
    choices: Sequence[str] = (),
) -> LabelTask:
    """Detect the task of labeled samples. Given values take precedence.

    Answers are boxes if one of them has a box, fields if all are JSON objects, and classes if at
    most `MAX_CLASSES` different answers occur `MIN_CLASS_REPEATS` times on average.
    """
    answers = [one.sample.messages[-1] for one in examples]
    contents = [message.content for message in answers if message.role == "assistant"]
    boxes = [part for content in contents for part in content if isinstance(part, BoxPart)]
    texts = [get_text(content) for content in contents]
    objects = [_parse_object(text) for text in texts]
    counts = dict.fromkeys(texts)
    detected: AnswerKind = "text"
    if boxes:
        detected = "boxes"
    elif objects and None not in objects:
        detected = "fields"
    elif texts and len(counts) <= min(MAX_CLASSES, len(texts) // MIN_CLASS_REPEATS):
        detected = "classes"
    kind = kind or ("classes" if choices and detected == "text" else detected)
    if not choices and kind in ("boxes", "classes"):
        names = (box.label for box in boxes) if kind == "boxes" else iter(counts)
        choices = [name for name in dict.fromkeys(names) if name]
    template = ""
    if kind == "fields" and objects and objects[0] is not None:
        template = json.dumps(_clear_values(objects[0]), ensure_ascii=False)
    if prompt is None and examples:
        prompt = _get_prompt(examples[0].sample)
    return LabelTask(kind, prompt, tuple(choices), template)


def read_items(sources: Iterable[Path], prompt: str | None) -> list[LocatedSample]:
    """Read samples from data files, and build one sample for each image.

    Args:
        sources: Images, folders of images (searched recursively), and JSONL files.
        prompt: Question about each image.

    Raises:
        UserError: A source is missing, nothing is found, or images have no prompt.
    """
    items: list[LocatedSample] = []
    for source in sources:
        if not source.exists():
            raise UserError(
                f"{source} does not exist",
                where="label",
                expected="images, folders of images, or a JSONL file",
                remedy=suggest_similar_path(source),
            )
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if _is_image(path))
        elif _is_image(source):
            files = [source]
        else:
            samples = read_samples(source, require_answer=False)
            items += [LocatedSample(sample, source.parent) for sample in samples]
            continue
        if files and prompt is None:
            raise UserError(
                "images have no prompt",
                where="--prompt",
                expected="a question, because the training data of a run does not provide one",
                remedy='for example: --prompt "Read the receipt."',
            )
        items += [_build_question(path, prompt or "") for path in files]
    if not items:
        raise UserError(
            "no images and no samples",
            where=", ".join(map(str, sources)),
            expected="images, folders of images, or a JSONL file",
            remedy="correct the paths",
        )
    return items


def get_text(content: Sequence[ContentPart]) -> str:
    """Return the text of an answer without its boxes."""
    return "".join(part.text for part in content if isinstance(part, TextPart))


def _build_question(path: Path, prompt: str) -> LocatedSample:
    question = (ImagePart(image=path.name), TextPart(text=prompt))
    sample = Sample(id=str(path), messages=(Message(role="user", content=question),))
    return LocatedSample(sample, path.parent)


def _is_image(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts if part not in (".", ".."))
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not is_hidden


def _get_prompt(sample: Sample) -> str | None:
    turns = [message for message in sample.messages if message.role == "user"]
    return get_text(turns[-1].content) or None


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _clear_values(value: Any) -> Any:
    """Return a JSON value with empty texts, and with one item per list."""
    if isinstance(value, dict):
        return {key: _clear_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clear_values(inner) for inner in value[:1]]
    return ""
