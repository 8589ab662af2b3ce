"""Forms of the questions in samples: order of images and text, white space, frequent prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from finesight.data.corpus import Corpus, draw_subset
from finesight.data.prompt_format import (
    IMAGE_MARK,
    MARKS,
    QUESTION_MARK,
    PromptFormat,
)
from finesight.data.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Sample,
    TextPart,
    VideoPart,
    join_text,
)
from finesight.errors import UserError
from finesight.manifest import PromptTemplate

MAX_TEMPLATES = 3
"""Maximum number of recorded forms."""

MAX_PROMPTS = 4
"""Maximum number of recorded prompts."""

MIN_SHARE = 0.01
"""Minimum share of the questions with a recorded form or prompt."""

MAX_PROMPT_CHARS, MAX_SYSTEM_CHARS = 400, 4000
"""Maximum number of characters of a recorded prompt, and of a system prompt."""

MAX_READ_SAMPLES = 500
"""Maximum number of samples that are read to find the form of the questions."""

_IMAGE = "\ufffc"
"""Character of an image or video in the text of a question (OBJECT REPLACEMENT CHARACTER)."""

_REGION = "\ufffd"
"""Character of a box or tool call in the text of a question."""

_IMAGES = re.compile(f"{_IMAGE}+")
_TEXT = re.compile(f"[^{_IMAGE}]+")


@dataclass(frozen=True, slots=True)
class Question:
    """First question of a sample.

    Attributes:
        text: Text with a character for each image.
        system_prompt: System prompt of the sample; None without one.
        can_be_typed: Whether a prompt can be this question: it has a text, but no boxes, tool calls
            or marks.
    """

    text: str
    system_prompt: str | None
    can_be_typed: bool

    @property
    def num_images(self) -> int:
        return self.text.count(_IMAGE)

    @property
    def image_counts(self) -> tuple[int, ...]:
        """Number of images at each position between texts."""
        return tuple(map(len, _IMAGES.findall(self.text)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts between the images."""
        return tuple(_TEXT.findall(self.text))

    @property
    def layout(self) -> str:
        """Order of texts, as T, and images; adjacent images are one."""
        return _TEXT.sub("T", _IMAGES.sub(_IMAGE, self.text))


def read_prompt_format(corpus: Corpus, indices: Sequence[int]) -> PromptFormat:
    """Find forms and frequent prompts of the questions of a corpus."""
    samples = []
    for number in draw_subset(len(indices), MAX_READ_SAMPLES):
        # Samples beyond a partial scan may be invalid.
        with suppress(UserError):
            samples.append(corpus.read_validated(indices[number]))
    return find_prompt_format(samples)


def find_prompt_format(samples: Iterable[LocatedSample]) -> PromptFormat:
    """Find forms and frequent prompts of the first questions of samples.

    Several answers to a question count once. A prompt, or a system prompt, of fewer than two or
    1 % of the questions is left out: it may be private, and manifests are published with models.
    """
    questions: dict[object, Question] = {}
    for located in samples:
        question = _read_question(located.sample)
        if question is not None:
            media = tuple(filter(_is_media, located.sample.iter_parts()))
            questions[question, located.folder, media] = question
    found = [*questions.values()]
    prompt_format = PromptFormat(_find_templates(found))
    return PromptFormat(prompt_format.templates, _find_prompts(found, prompt_format))


def _find_templates(questions: Sequence[Question]) -> tuple[PromptTemplate, ...]:
    """Return the forms of questions, the most frequent first."""
    by_layout: dict[str, list[Question]] = {}
    for question in questions:
        by_layout.setdefault(question.layout, []).append(question)
    by_template: dict[str, list[Question]] = {}
    for group in by_layout.values():
        for question, template in zip(group, _write_templates(group), strict=True):
            by_template.setdefault(template, []).append(question)
    templates = []
    for template, group in by_template.items():
        share = len(group) / len(questions)
        if share >= MIN_SHARE:
            templates.append(_describe_form(template, group, share))
    templates.sort(key=lambda template: -template.share)
    return tuple(templates[:MAX_TEMPLATES])


def _find_prompts(questions: Sequence[Question], prompt_format: PromptFormat) -> tuple[str, ...]:
    """Return the frequent prompts, with marks of images if they have another form."""
    counts: Counter[str] = Counter()
    for question in questions:
        if question.can_be_typed:
            counts[_write_prompt(question, prompt_format)] += 1
    prompts = []
    for prompt, count in counts.most_common():
        is_frequent = count >= max(2, MIN_SHARE * len(questions))
        if is_frequent and len(prompt) <= MAX_PROMPT_CHARS:
            prompts.append(prompt)
    return tuple(prompts[:MAX_PROMPTS])


def _is_media(part: ContentPart) -> bool:
    return isinstance(part, ImagePart | VideoPart)


def _read_question(sample: Sample) -> Question | None:
    """Return the first question with images, or else the first one; None without questions."""
    turns = [turn.content for turn in sample.messages if turn.role == "user"]
    if not turns:
        return None
    content = next((turn for turn in turns if any(map(_is_media, turn))), turns[0])
    text = _write_text(content)
    typed = join_text(content)
    first = sample.messages[0]
    system_prompt = None
    if first.role == "system":
        system_prompt = join_text(first.content)
    can_be_typed = typed.strip() != "" and _REGION not in text and not MARKS.search(typed)
    return Question(text, system_prompt, can_be_typed)


def _write_text(content: Sequence[ContentPart]) -> str:
    """Return the text of a message with a character for each image, box and tool call."""
    pieces = []
    for part in content:
        if isinstance(part, TextPart):
            pieces.append(part.text.replace(_IMAGE, _REGION))
        elif _is_media(part):
            pieces.append(_IMAGE)
        else:
            pieces.append(_REGION)
    return "".join(pieces)


def _describe_form(template: str, questions: Sequence[Question], share: float) -> PromptTemplate:
    counts: list[int] = []
    system_prompts: set[str | None] = set()
    for question in questions:
        counts.append(question.num_images)
        system_prompts.add(question.system_prompt)
    system_prompt = None
    if len(system_prompts) == 1 and len(questions) > 1:
        system_prompt = system_prompts.pop()
    if system_prompt is not None and len(system_prompt) > MAX_SYSTEM_CHARS:
        system_prompt = None
    return PromptTemplate(
        template=template,
        min_images=min(counts),
        max_images=max(counts),
        system_prompt=system_prompt,
        share=share,
    )


def _write_templates(questions: Sequence[Question]) -> list[str]:
    """Write the template of each question of a group with equal order of text and images.

    The text that differs between the questions is the question, and texts that are always equal,
    such as `Image 1:`, belong to the template. If several texts differ, as in texts with images at
    any position, one question cannot be put into a template, which then has no mark of an image.
    """
    fixed_texts: dict[int, str] = {}
    different: list[int] = []
    for index, column in enumerate(zip(*(one.texts for one in questions), strict=True)):
        if len({*column}) == 1:
            fixed_texts[index] = column[0]
        else:
            different.append(index)
    if not different:
        # One prompt for all samples, of which the longest text is the question.
        slot = max(fixed_texts, key=lambda index: len(fixed_texts[index]), default=0)
        return [_write_template(one, slot, {}) for one in questions]
    slot = different[-1]
    image_counts = {one.image_counts for one in questions}
    has_fixed_counts = len(image_counts) == 1 or len(questions[0].image_counts) < 2
    has_marks = any(map(MARKS.search, fixed_texts.values()))
    if len(different) > 1 or has_marks or not has_fixed_counts:
        return [_mark_question(one.texts[slot]) for one in questions]
    return [_write_template(one, slot, fixed_texts) for one in questions]


def _write_template(question: Question, slot: int, fixed_texts: dict[int, str]) -> str:
    """Write a question as a template, with the texts that belong to it.

    Args:
        slot: Index of the text that is the question.
    """
    texts = dict(fixed_texts)
    if slot < len(question.texts):
        texts[slot] = _mark_question(question.texts[slot])
    text = question.text
    if len(question.image_counts) == 1:
        text = _IMAGES.sub(_IMAGE, text)  # one mark stands for all images at one position
    pieces: list[str] = []
    num_texts = 0
    for piece in re.split(f"({_IMAGE})", text):
        if piece == _IMAGE:
            pieces.append(IMAGE_MARK)
        elif piece:
            pieces.append(texts.get(num_texts, ""))
            num_texts += 1
    template = "".join(pieces)
    if QUESTION_MARK not in template:
        template += QUESTION_MARK
    return template


def _mark_question(text: str) -> str:
    """Return the mark of a question with the white space around its text."""
    stripped = text.strip()
    if not stripped:
        return QUESTION_MARK
    before, _, after = text.partition(stripped)
    return before + QUESTION_MARK + after


def _write_prompt(question: Question, prompt_format: PromptFormat) -> str:
    """Return the text of a question, with marks if the format has another form."""
    text = question.text.replace(_IMAGE, "")
    images = [ImagePart(image="")] * question.num_images
    if _write_text(prompt_format.build_content(text, images)) == question.text:
        return text
    return _write_marks(question.text)


def _write_marks(text: str) -> str:
    """Replace the images in the text of a question by marks, all at one position by one."""
    if len(_IMAGES.findall(text)) == 1:
        text = _IMAGES.sub(_IMAGE, text)
    return text.replace(_IMAGE, IMAGE_MARK)


def format_marked_prompt(content: Sequence[ContentPart], text: str | None = None) -> str:
    """Return the prompt that `PromptFormat.build_content` converts to this content.

    Args:
        text: Text instead of that of the content, if the content has only one.
    """
    found = _write_text(content)
    if text is not None and len(_TEXT.findall(found)) == 1:
        found = _TEXT.sub(lambda match: text, found)
    return _write_marks(found)
