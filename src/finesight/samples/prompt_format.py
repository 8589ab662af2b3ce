"""Form of the training questions, and new questions of the same form.

Answers are best if a question has the form of the training: the order of images and text, the white
space around the text, and the system prompt. `samples/question_forms.py` finds the forms in
samples, and the manifest of a run records them. `PromptFormat` writes new questions in this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finesight.errors import shorten
from finesight.samples.marked_prompt import (
    IMAGE_MARK,
    MediaPart,
    can_hold,
    count_marks,
    escape_marks,
    insert_images,
    remove_marks,
    split_at_marks,
    write_marked_prompt,
)
from finesight.samples.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
    is_video_path,
)
from finesight.settings.manifest import (
    QUESTION_MARK,
    Manifest,
    PromptTemplate,
    find_manifest_file,
    load_manifest,
)

DEFAULT_TEMPLATE = IMAGE_MARK + QUESTION_MARK
"""Form of questions to a model without a recorded form."""

MAX_SHOWN_CHARS = 200
"""Maximum number of characters of a template in a note."""

UNIFORM_SHARE = 0.95
"""Share of the most frequent form from which questions count as of one form."""


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
        """Read the format of a run, its checkpoint or adapter, without loading the model.

        Raises:
            UserError: The manifest is invalid.
        """
        file = find_manifest_file(run_or_model)
        if file is None:
            return cls()
        return cls.from_manifest(load_manifest(file))

    @property
    def num_images(self) -> int | None:
        """Number of images of each training question; None if it varies or is unknown."""
        counts: set[int] = set()
        for template in self.templates:
            counts.update((template.min_images, template.max_images))
        if len(counts) != 1:
            return None
        return counts.pop()

    @property
    def usual_num_images(self) -> int:
        """Number of images of the most frequent questions; 1 if it is unknown."""
        return self.templates[0].max_images if self.templates else 1

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

    def get_system_prompt(self, num_images: int) -> str | None:
        """Return the system prompt of questions about this number of images.

        It is that of their training samples; None for that of the recipe or the model.
        """
        templates = self.select_templates(num_images) or self.templates
        return templates[0].system_prompt if templates else None

    def build_system_messages(self, num_images: int) -> tuple[Message, ...]:
        """Return the system message of a conversation whose first images are so many.

        It is empty if the system prompt is that of the recipe or the model.
        """
        system_prompt = self.get_system_prompt(num_images)
        if system_prompt is None:
            return ()
        return (Message(role="system", content=(TextPart(text=system_prompt),)),)

    def add_system_message(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Give a conversation without a system message that of the training, if any."""
        if not messages or messages[0].role == "system":
            return tuple(messages)
        num_images = 0
        for message in messages:
            if message.role == "user" and not num_images:
                num_images = sum(isinstance(part, MediaPart) for part in message.content)
        return (*self.build_system_messages(num_images), *messages)

    def build_content(self, text: str, media: Sequence[MediaPart]) -> tuple[ContentPart, ...]:
        r"""Write a question about images and videos in the form of the training.

        `<image>` in the text sets the position of an image, or of all images if it occurs once.
        `\<image>` is a word of the text. Without images, both are text.

        Raises:
            UserError: The text has another number of `<image>` than there are images.
        """
        if media and count_marks(text):
            return insert_images(text, media)
        known = self._find_prompt(text, len(media))
        if known is not None:
            return insert_images(known, media)
        templates = self.select_templates(len(media))
        if not templates:
            # No run, or a later question of a conversation, of which the form is not recorded.
            return (*media, TextPart(text=remove_marks(text) if media else text))
        template = _select_by_space(templates, text)
        if not can_hold(template, len(media)):
            template = DEFAULT_TEMPLATE if media else QUESTION_MARK
        question = text.strip()
        if not media:
            question = escape_marks(question)
        before, _, after = template.partition(QUESTION_MARK)
        return insert_images(before + question + after, media) or (TextPart(text=""),)

    def _find_prompt(self, text: str, num_images: int) -> str | None:
        """Return the training prompt that a text means, apart from white space around it.

        The text may also be the last or the longest one between the images of the prompt.
        """
        typed = text.strip()
        for prompt in self.prompts:
            if not typed or not can_hold(prompt, num_images):
                continue
            texts = split_at_marks(prompt)
            longest = max(texts, key=len)
            if typed in (remove_marks(prompt).strip(), texts[-1].strip(), longest.strip()):
                return prompt
        return None

    def build_message(self, text: str, paths: Sequence[Path]) -> Message:
        """Build a user turn about images and videos.

        Raises:
            UserError: See `build_content`.
        """
        content = self.build_content(text, [*map(build_media_part, paths)])
        return Message(role="user", content=content)

    def build_sample(
        self, text: str, paths: Sequence[Path], sample_id: str, folder: Path = Path()
    ) -> LocatedSample:
        """Build a sample of one question about images and videos.

        Raises:
            UserError: See `build_content`.
        """
        messages = self.add_system_message([self.build_message(text, paths)])
        return LocatedSample(Sample(id=sample_id, messages=messages), folder)

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

    def arrange(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Give the questions of a conversation the form of the training, and its system prompt.

        Only user turns of images and one text change, and only if the training has a form for them.
        """
        return self.add_system_message([self.arrange_question(message) for message in messages])

    def arrange_question(self, message: Message) -> Message:
        """Give a user turn of images and one text the form of the training.

        Other turns are returned unchanged.
        """
        media: list[MediaPart] = []
        texts: list[str] = []
        for part in message.content:
            if isinstance(part, MediaPart):
                media.append(part)
            elif isinstance(part, TextPart):
                texts.append(part.text)
            else:
                return message
        templates = self.select_templates(len(media))
        if message.role != "user" or not media or len(texts) != 1 or not templates:
            return message
        if IMAGE_MARK in texts[0] or not can_hold(templates[0].template, len(media)):
            return message
        return Message(role="user", content=self.build_content(texts[0], media))

    def can_be_question(self, content: Sequence[ContentPart], system_prompt: str | None) -> bool:
        """Return whether training questions may have this content and system prompt."""
        prompt = write_marked_prompt(content)
        num_images = count_marks(prompt)
        recorded_share = 0.0
        for template in self.templates:
            if bool(template.max_images) != bool(num_images):
                continue
            recorded_share += template.share
            if not template.min_images <= num_images <= template.max_images:
                continue
            if template.system_prompt not in (None, system_prompt):
                continue
            has_any_position = num_images > 0 and not count_marks(template.template)
            if has_any_position or _matches(template.template, content):
                return True
        # Rare forms are not recorded.
        return recorded_share < UNIFORM_SHARE or prompt in self.prompts

    def describe_forms(self) -> list[FormatNote]:
        """Describe questions of several forms, of which new ones have the most frequent."""
        notes: list[FormatNote] = []
        for template in self.templates:
            for note in self._describe_forms(template.max_images):
                if note not in notes:
                    notes.append(note)
        return notes

    def describe_difference(self, prompt: str, num_images: int) -> list[FormatNote]:
        """Describe how a question about this number of images may differ from the training."""
        if not self.templates or count_marks(prompt):
            return []
        if self._find_prompt(prompt, num_images) is not None:
            return []
        templates = self.select_templates(num_images)
        if not templates and not num_images:
            return [FormatNote("The training questions have images. Give an image file.")]
        if not templates:
            return [FormatNote("The training questions have no images.")]
        least = min(template.min_images for template in templates)
        most = max(template.max_images for template in templates)
        if not least <= num_images <= most:
            text = "Number of images: {}, but {} in the training questions."
            return [FormatNote(text, (num_images, format_range(least, most)))]
        return self._describe_forms(num_images)

    def _describe_forms(self, num_images: int) -> list[FormatNote]:
        templates = self.select_templates(num_images)
        first = templates[0]
        notes = []
        if first.share < UNIFORM_SHARE * sum(template.share for template in templates):
            forms = []
            for template in templates:
                shown = shorten(repr(template.template), MAX_SHOWN_CHARS)
                forms.append(f"{shown} ({template.share:.0%})")
            text = "The training questions have several forms: {}. New questions have the first."
            notes.append(FormatNote(text, (", ".join(forms),)))
        if num_images and not count_marks(first.template):
            text = (
                "The training questions have images between texts, or boxes: write <image> at each"
                " position."
            )
            notes.append(FormatNote(text))
        return notes


DEFAULT_PROMPT_FORMAT = PromptFormat()
"""Form of questions to a model that is no run: images, then text."""


def build_media_part(path: Path) -> MediaPart:
    """Build the part of a message for an image or video file."""
    if is_video_path(path):
        return VideoPart(video=str(path))
    return ImagePart(image=str(path))


def format_range(first: int, last: int) -> str:
    """Format a range of numbers, such as `2` or `1 to 3`."""
    return str(first) if first == last else f"{first} to {last}"


def _select_by_space(templates: Sequence[PromptTemplate], text: str) -> str:
    """Return the template with the white space that was typed around a question, or the first."""
    typed = _get_space_around(text, text.strip())
    for template in templates:
        if _get_space_around(template.template, QUESTION_MARK) == typed != ("", ""):
            return template.template
    return templates[0].template


def _get_space_around(text: str, question: str) -> tuple[str, str]:
    """Return the white space directly before and after the question of a text."""
    before, _, after = text.partition(question) if question else ("", "", "")
    return before[len(before.rstrip()) :], after[: len(after) - len(after.lstrip())]


def _matches(template: str, content: Sequence[ContentPart]) -> bool:
    """Return whether a template with some question gives a content."""
    prompt = write_marked_prompt(content)
    num_images = count_marks(prompt)
    if not can_hold(template, num_images):
        return False
    before, _, after = template.partition(QUESTION_MARK)
    # With all images at one position, the template has one mark for them.
    if count_marks(template) == 1:
        marks = IMAGE_MARK * num_images
        before = before.replace(IMAGE_MARK, marks)
        after = after.replace(IMAGE_MARK, marks)
    if len(prompt) < len(before) + len(after):
        return False
    if not (prompt.startswith(before) and prompt.endswith(after)):
        return False
    question = prompt[len(before) : len(prompt) - len(after)]
    return question == question.strip() and not count_marks(question)
