"""Form of the training questions, and new questions of the same form.

Answers are best if a question has the form of the training: the order of images and text, the white
space around the text, and the system prompt. `data/question_forms.py` finds the forms in samples,
and the manifest of a run records them. `PromptFormat` writes new questions in this form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finesight.data.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
    is_video_path,
)
from finesight.errors import Step, UserError, format_count
from finesight.manifest import (
    MANIFEST_FILE,
    Manifest,
    PromptTemplate,
    find_run_dir,
    load_manifest,
)

IMAGE_MARK = "<image>"
"""Position of an image or video in a template or prompt, or of all of them."""

QUESTION_MARK = "{question}"
"""Position of the question in a template."""

MARKS = re.compile(f"({re.escape(IMAGE_MARK)}|{re.escape(QUESTION_MARK)})")

DEFAULT_TEMPLATE = IMAGE_MARK + QUESTION_MARK
"""Form of questions to a model without a recorded form."""

MediaPart = ImagePart | VideoPart


class FormatNote(NamedTuple):
    """An English text, which pages translate, and the values of its placeholders `{}`."""

    text: str
    values: tuple[object, ...] = ()

    def __str__(self) -> str:
        return self.text.format(*self.values)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Forms of the training questions, the most frequent first, and the most frequent prompts.

    Both are empty for a model that is no run. See `Manifest` for their notation.
    """

    templates: tuple[PromptTemplate, ...] = ()
    prompts: tuple[str, ...] = ()

    @classmethod
    def from_manifest(cls, manifest: Manifest | None) -> PromptFormat:
        """Return the format of a run; the default for a model that is no run."""
        if manifest is None:
            return cls()
        return cls(manifest.prompt_templates, manifest.prompts)

    @classmethod
    def from_run(cls, run_or_model: Path) -> PromptFormat:
        """Read the format of a run or its checkpoint, without loading the model.

        Raises:
            UserError: The manifest is invalid.
        """
        file = find_run_dir(run_or_model) / MANIFEST_FILE
        return cls.from_manifest(load_manifest(file) if os.path.isfile(file) else None)

    @property
    def system_prompt(self) -> str | None:
        """System prompt of the training samples; None for that of the recipe or the model."""
        return self.templates[0].system_prompt if self.templates else None

    @property
    def system_messages(self) -> tuple[Message, ...]:
        """System message to start a conversation with; empty for that of recipe or model."""
        if self.system_prompt is None:
            return ()
        return (Message(role="system", content=(TextPart(text=self.system_prompt),)),)

    @property
    def num_images(self) -> int | None:
        """Number of images of each training question; None if it varies or is unknown."""
        counts = {one.min_images for one in self.templates}
        counts |= {one.max_images for one in self.templates}
        return counts.pop() if len(counts) == 1 else None

    def select_templates(self, num_images: int) -> list[PromptTemplate]:
        """Return the forms of questions about this number of images, or else about any images."""
        about_images: list[PromptTemplate] = []
        fitting: list[PromptTemplate] = []
        for template in self.templates:
            if template.min_images <= num_images <= template.max_images:
                fitting.append(template)
            if template.max_images > 0:
                about_images.append(template)
        if num_images and not fitting:
            return about_images
        return fitting

    def build_content(self, text: str, media: Sequence[MediaPart]) -> tuple[ContentPart, ...]:
        """Write a question about images and videos in the form of the training.

        `<image>` in the text sets the position of an image, or of all images if it occurs once.

        Raises:
            UserError: The text has another number of `<image>` than there are images.
        """
        text = self._find_prompt(text, len(media))
        if IMAGE_MARK in text:
            return _insert_images(text, media)
        templates = self.select_templates(len(media))
        if not templates:
            # No run, or a later question of a conversation, of which the form is not recorded.
            return (*media, TextPart(text=text))
        template = templates[0].template
        if media and template.count(IMAGE_MARK) not in (1, len(media)):
            template = DEFAULT_TEMPLATE
        # The template has the question once, and the question may contain braces.
        before, _, after = template.partition(QUESTION_MARK)
        return _insert_images(before + text.strip() + after, media)

    def _find_prompt(self, text: str, num_images: int) -> str:
        """Return the exact training prompt that a text means, or else the text."""
        for prompt in self.prompts:
            variants = (prompt.strip(), remove_marks(prompt).strip())
            num_marks = prompt.count(IMAGE_MARK)
            is_usable = num_marks in (0, num_images) or (num_marks == 1 and num_images > 1)
            if is_usable and text.strip() in variants:
                return prompt
        return text

    def build_sample(
        self, text: str, paths: Sequence[Path], sample_id: str, folder: Path = Path()
    ) -> LocatedSample:
        """Build a sample of one question about images and videos.

        Raises:
            UserError: See `build_content`.
        """
        messages = (*self.system_messages, self.build_message(text, paths))
        return LocatedSample(Sample(id=sample_id, messages=messages), folder)

    def build_message(self, text: str, paths: Sequence[Path]) -> Message:
        """Build a user turn about images and videos.

        Raises:
            UserError: See `build_content`.
        """
        content = self.build_content(text, [*map(build_media_part, paths)])
        return Message(role="user", content=content)

    def build_request_content(self, text: str, urls: Sequence[str]) -> list[dict[str, Any]]:
        """Write a question about images as the content of a message of the OpenAI API.

        Raises:
            UserError: See `build_content`.
        """
        images = [ImagePart(image=url) for url in urls]
        content: list[dict[str, Any]] = []
        for part in self.build_content(text, images):
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, ImagePart):
                content.append({"type": "image_url", "image_url": {"url": part.image}})
        return content

    def arrange(self, message: Message) -> Message:
        """Give a user turn of images and one text the form of the training.

        Other turns are returned unchanged, as are all turns if the model has no recorded form, or
        if its training has images at any position.
        """
        media: list[MediaPart] = []
        texts: list[str] = []
        for part in message.content:
            if isinstance(part, ImagePart | VideoPart):
                media.append(part)
            elif isinstance(part, TextPart):
                texts.append(part.text)
            else:
                return message
        templates = self.select_templates(len(media))
        if message.role != "user" or not media or len(texts) != 1 or not templates:
            return message
        has_any_position = IMAGE_MARK not in templates[0].template
        if has_any_position or IMAGE_MARK in texts[0]:
            return message
        return Message(role="user", content=self.build_content(texts[0], media))

    def describe_forms(self) -> list[FormatNote]:
        """Describe questions of several forms, of which new ones have the most frequent."""
        notes: list[FormatNote] = []
        for template in self.templates:
            for note in self._describe_forms(template.max_images):
                if note not in notes:
                    notes.append(note)
        return notes

    def describe_difference(self, text: str, num_images: int) -> list[FormatNote]:
        """Describe how a question about this number of images may differ from the training."""
        prompt = self._find_prompt(text, num_images)
        if not self.templates or IMAGE_MARK in prompt or prompt in self.prompts:
            return []
        templates = self.select_templates(num_images)
        if not templates and not num_images:
            return [FormatNote("The training questions have images.")]
        if not templates:
            return [FormatNote("The training questions have no images.")]
        least = min(one.min_images for one in templates)
        most = max(one.max_images for one in templates)
        if not least <= num_images <= most:
            text = "Number of images: {}, but {} in the training questions."
            return [FormatNote(text, (num_images, format_range(least, most)))]
        return self._describe_forms(num_images)

    def _describe_forms(self, num_images: int) -> list[FormatNote]:
        templates = self.select_templates(num_images)
        notes = []
        if len(templates) > 1:
            forms = ", ".join(f"{one.template!r} ({one.share:.0%})" for one in templates)
            text = "The training questions have several forms: {}. New questions have the first."
            notes.append(FormatNote(text, (forms,)))
        if num_images and IMAGE_MARK not in templates[0].template:
            text = (
                "The training questions have images between texts: write <image> at each position."
            )
            notes.append(FormatNote(text))
        return notes


DEFAULT_PROMPT_FORMAT = PromptFormat()
"""Form of questions to a model that is no run: images, then text."""


class ExampleQuestion(NamedTuple):
    """Question of example commands: image files, or `IMAGE`, and a prompt, or `TEXT`."""

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
    """Return a question with the most frequent prompt of a run and as many images."""
    prompt_format = DEFAULT_PROMPT_FORMAT
    with suppress(UserError):
        prompt_format = PromptFormat.from_run(run_dir)
    num_images = 1
    if prompt_format.templates:
        num_images = prompt_format.templates[0].max_images
    prompt = next(iter(prompt_format.prompts), "TEXT")
    return ExampleQuestion(("IMAGE",) * num_images, prompt)


def build_media_part(path: Path) -> MediaPart:
    """Build the part of a message for an image or video file."""
    if is_video_path(path):
        return VideoPart(video=str(path))
    return ImagePart(image=str(path))


def format_range(first: int, last: int) -> str:
    """Format a range of numbers, such as `2` or `1 to 3`."""
    return str(first) if first == last else f"{first} to {last}"


def _insert_images(text: str, media: Sequence[MediaPart]) -> tuple[ContentPart, ...]:
    """Replace each `<image>` of a text by an image, or one by all."""
    texts = text.split(IMAGE_MARK)
    num_marks = len(texts) - 1
    if num_marks not in (1, len(media)) or (num_marks and not media):
        raise UserError(
            f"{num_marks} times {IMAGE_MARK} for {format_count(len(media), 'image')}",
            where="prompt",
            expected=f"{IMAGE_MARK} once for each image, or once for all of them",
            remedy=f"add images, or remove {IMAGE_MARK} from the prompt",
        )
    remaining = [*media]
    content: list[ContentPart] = []
    for index, piece in enumerate(texts):
        if piece:
            content.append(TextPart(text=piece))
        if num_marks == 1:
            content += remaining
            remaining = []
        elif index < num_marks:
            content.append(remaining.pop(0))
    return tuple(content) or (TextPart(text=""),)


def remove_marks(prompt: str) -> str:
    """Return a prompt without marks of images."""
    return prompt.replace(IMAGE_MARK, "")
