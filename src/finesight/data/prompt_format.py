"""Form of the training questions, and new questions of the same form.

Answers are best if a question has the form of the training: the order of images and text, the white
space around the text, and the system prompt. `find_prompt_format` finds the forms in samples, and
the manifest of a run records them. `PromptFormat.build_content` writes new questions in this form.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from finesight.data.corpus import Corpus, draw_subset
from finesight.data.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
    is_video_path,
    join_text,
)
from finesight.errors import Step, UserError, format_count
from finesight.manifest import (
    MANIFEST_FILE,
    Manifest,
    PromptTemplate,
    find_run_dir,
    load_manifest,
)

IMAGE_MARK, QUESTION_MARK = "<image>", "{question}"
"""Positions of an image or video, and of the question, in a template."""

MAX_TEMPLATES = 3
"""Maximum number of recorded forms."""

MAX_PROMPT_SAMPLES = 500
"""Maximum number of samples that are read to find the form of the questions."""

MIN_SHARE = 0.01
"""Minimum share of the questions with a recorded form or prompt."""

MAX_PROMPTS, MAX_PROMPT_CHARS, MAX_SYSTEM_CHARS = 4, 400, 4000
"""Maximum number of recorded prompts, and of characters of a prompt and of a system prompt."""

DEFAULT_TEMPLATE = IMAGE_MARK + QUESTION_MARK
"""Form of questions to a model without a recorded form."""

_OTHER_PART = "\ufffc"
"""Text in place of a box or tool call."""

_MARKS = re.compile(f"({re.escape(IMAGE_MARK)}|{re.escape(QUESTION_MARK)})")

MediaPart = ImagePart | VideoPart


class _Question(NamedTuple):
    """First question of a sample: texts, and None for each image or video.

    A question without text, or with boxes, tool calls or marks in its text, cannot be typed.
    """

    pieces: tuple[str | None, ...]
    system_prompt: str | None
    can_be_typed: bool

    @property
    def layout(self) -> tuple[bool, ...]:
        """Order of texts (True) and images; adjacent images are one piece."""
        return tuple(
            piece is not None
            for index, piece in enumerate(self.pieces)
            if piece is not None or index == 0 or self.pieces[index - 1] is not None
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(piece for piece in self.pieces if piece is not None)

    @property
    def num_images(self) -> int:
        return self.pieces.count(None)


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
        if not num_images:
            return [one for one in self.templates if one.min_images == 0]
        about_images = [one for one in self.templates if one.max_images > 0]
        fitting = [one for one in about_images if one.min_images <= num_images <= one.max_images]
        return fitting or about_images

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
        question = text.strip()
        pieces = _MARKS.split(template)
        marked_text = "".join(question if piece == QUESTION_MARK else piece for piece in pieces)
        return _insert_images(marked_text, media)

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
        content: list[dict[str, Any]] = []
        for part in self.build_content(text, [ImagePart(image=url) for url in urls]):
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
        media = [part for part in message.content if isinstance(part, ImagePart | VideoPart)]
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        templates = self.select_templates(len(media))
        has_one_text = len(texts) == 1 and len(media) == len(message.content) - 1
        if not media or not has_one_text or not templates or message.role != "user":
            return message
        if IMAGE_MARK in texts[0] or IMAGE_MARK not in templates[0].template:
            return message
        return Message(role="user", content=self.build_content(texts[0], media))

    def describe_forms(self) -> list[FormatNote]:
        """Describe questions of several forms, of which new ones have the most frequent."""
        counts = dict.fromkeys((one.min_images, one.max_images) for one in self.templates)
        notes = {note: None for _, most in counts for note in self._describe_forms(most)}
        return [*notes]

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
    num_images = prompt_format.templates[0].max_images if prompt_format.templates else 1
    prompt = prompt_format.prompts[0] if prompt_format.prompts else "TEXT"
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
    groups = [[*media]] if num_marks == 1 else [[part] for part in media]
    content: list[ContentPart] = []
    for index, piece in enumerate(texts):
        if piece:
            content.append(TextPart(text=piece))
        if index < len(groups):
            content += groups[index]
    return tuple(content) or (TextPart(text=""),)


def read_prompt_format(corpus: Corpus, indices: Sequence[int]) -> PromptFormat:
    """Find forms and frequent prompts of the questions of a corpus."""
    samples = []
    for number in draw_subset(len(indices), MAX_PROMPT_SAMPLES):
        # Samples beyond a partial scan may be invalid.
        with suppress(UserError):
            samples.append(corpus.read_validated(indices[number]))
    return find_prompt_format(samples)


def find_prompt_format(samples: Iterable[LocatedSample]) -> PromptFormat:
    """Find forms and frequent prompts of the first questions of samples.

    Several answers to a question count once. A prompt, or a system prompt, of fewer than two or
    1 % of the questions is left out: it may be private, and manifests are published with models.
    """
    questions: dict[object, _Question] = {}
    for located in samples:
        question = _read_question(located.sample)
        if question is not None:
            media = tuple(part for part in located.sample.iter_parts() if _is_media(part))
            questions[question, located.folder, media] = question
    found = [*questions.values()]
    by_form = defaultdict[str, list[_Question]](list)
    for layout in {one.layout: None for one in found}:
        group = [one for one in found if one.layout == layout]
        for question, template in zip(group, _build_templates(group), strict=True):
            by_form[template].append(question)
    templates = [
        _describe_form(template, group, len(group) / len(found))
        for template, group in by_form.items()
        if len(group) >= MIN_SHARE * len(found)
    ]
    templates.sort(key=lambda one: -one.share)
    format_ = PromptFormat(tuple(templates[:MAX_TEMPLATES]))
    counts = Counter(_mark_prompt(one, format_) for one in found if one.can_be_typed)
    prompts = tuple(
        prompt
        for prompt, count in counts.most_common()
        if count >= max(2, MIN_SHARE * len(found)) and len(prompt) <= MAX_PROMPT_CHARS
    )
    return PromptFormat(format_.templates, prompts[:MAX_PROMPTS])


def _is_media(part: ContentPart) -> bool:
    return isinstance(part, ImagePart | VideoPart)


def _read_question(sample: Sample) -> _Question | None:
    """Return the first question with images, or else the first one; None without questions."""
    turns = [turn.content for turn in sample.messages if turn.role == "user"]
    if not turns:
        return None
    content = next((turn for turn in turns if any(map(_is_media, turn))), turns[0])
    has_only_text = all(isinstance(part, TextPart) or _is_media(part) for part in content)
    text = join_text(content)
    can_be_typed = has_only_text and text.strip() != "" and not _MARKS.search(text)
    first = sample.messages[0]
    system_prompt = join_text(first.content) if first.role == "system" else None
    return _Question(_split_content(content), system_prompt, can_be_typed)


def _split_content(content: Sequence[ContentPart]) -> tuple[str | None, ...]:
    """Split a message into texts and, as None, images and videos."""
    pieces: list[str | None] = []
    for part in content:
        if _is_media(part):
            pieces.append(None)
            continue
        text = part.text if isinstance(part, TextPart) else _OTHER_PART
        last = pieces[-1] if pieces else None
        if last is None:
            pieces.append(text)
        else:
            pieces[-1] = last + text
    return tuple(pieces)


def _describe_form(template: str, questions: Sequence[_Question], share: float) -> PromptTemplate:
    counts = [one.num_images for one in questions]
    system_prompts = {one.system_prompt for one in questions}
    system_prompt = system_prompts.pop() if len(system_prompts) == 1 else None
    if len(questions) < 2 or len(system_prompt or "") > MAX_SYSTEM_CHARS:
        system_prompt = None
    return PromptTemplate(
        template=template,
        min_images=min(counts),
        max_images=max(counts),
        system_prompt=system_prompt,
        share=share,
    )


def _build_templates(questions: Sequence[_Question]) -> list[str]:
    """Build the template of each question of a group with equal order of text and images.

    The text that differs between the questions is the question, and texts that are always equal,
    such as `Image 1:`, belong to the template. If several texts differ, as in texts with images at
    any position, one question cannot be put into a template, which then has no mark of an image.
    """
    columns = [*zip(*(one.texts for one in questions), strict=True)]
    different = [index for index, column in enumerate(columns) if len({*column}) > 1]
    if different:
        slot = different[-1]
    else:
        # One prompt for all samples, of which the longest text is the question.
        slot = max(range(len(columns)), key=lambda index: len(columns[index][0]), default=0)
    fixed_texts = [column[0] for index, column in enumerate(columns) if index not in different]
    image_counts = {_count_adjacent_images(one.pieces) for one in questions}
    num_marks = len(next(iter(image_counts)))
    is_usable = (
        len(different) <= 1
        and (num_marks < 2 or len(image_counts) == 1)
        and not (different and any(map(_MARKS.search, fixed_texts)))
    )
    if not is_usable:
        return [_format_text(one.texts[slot]) for one in questions]
    return [_format_template(one, slot, has_texts=bool(different)) for one in questions]


def _format_template(question: _Question, slot: int, *, has_texts: bool) -> str:
    """Write a question as a template.

    Args:
        slot: Index of the text that is the question.
        has_texts: Whether the template contains the other texts.
    """
    num_marks = len(_count_adjacent_images(question.pieces))
    parts: list[str] = []
    text_index = 0
    for piece in question.pieces:
        if piece is None:
            # One mark stands for any number of images, if all are at one position.
            if num_marks > 1 or IMAGE_MARK not in parts:
                parts.append(IMAGE_MARK)
            continue
        if text_index == slot:
            parts.append(_format_text(piece))
        elif has_texts:
            parts.append(piece)
        text_index += 1
    template = "".join(parts)
    return template if QUESTION_MARK in template else template + QUESTION_MARK


def _format_text(text: str) -> str:
    """Return the mark of a question with the white space around its text."""
    stripped = text.strip()
    if not stripped:
        return QUESTION_MARK
    before, _, after = text.partition(stripped)
    return before + QUESTION_MARK + after


def _count_adjacent_images(pieces: Sequence[str | None]) -> tuple[int, ...]:
    """Return the number of images at each position between texts."""
    groups = groupby(pieces, key=lambda piece: piece is None)
    return tuple(len([*group]) for is_image, group in groups if is_image)


def _mark_prompt(question: _Question, prompt_format: PromptFormat) -> str:
    """Return the text of a question, with marks if the format has another form."""
    text = "".join(question.texts)
    media = [ImagePart(image=str(index)) for index in range(question.num_images)]
    if _split_content(prompt_format.build_content(text, media)) == question.pieces:
        return text
    return _join_marked(question.pieces)


def _join_marked(pieces: Sequence[str | None]) -> str:
    """Join texts and marks of images, one for all images at the same position."""
    has_one_position = len(_count_adjacent_images(pieces)) == 1
    marked: list[str] = []
    for piece in pieces:
        if piece is not None:
            marked.append(piece)
        elif not has_one_position or IMAGE_MARK not in marked:
            marked.append(IMAGE_MARK)
    return "".join(marked)


def format_marked_prompt(content: Sequence[ContentPart], text: str | None = None) -> str:
    """Return the prompt that `PromptFormat.build_content` converts to this content.

    Args:
        text: Text instead of that of the content, if the content has only one.
    """
    pieces = _split_content(content)
    if text is not None and len([piece for piece in pieces if piece is not None]) == 1:
        pieces = tuple(None if piece is None else text for piece in pieces)
    return _join_marked(pieces)


def remove_marks(prompt: str) -> str:
    """Return a prompt without marks of images."""
    return prompt.replace(IMAGE_MARK, "")
