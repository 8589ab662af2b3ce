"""Forms of the questions in samples: order of images and text, white space, frequent prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from finesight.errors import UserError
from finesight.samples.corpus import Corpus, draw_subset
from finesight.samples.marked_prompt import (
    IMAGE_MARK,
    REGION,
    MediaPart,
    count_adjacent_marks,
    count_marks,
    join_adjacent_marks,
    remove_marks,
    split_at_marks,
    write_marked_prompt,
)
from finesight.samples.prompt_format import PromptFormat
from finesight.samples.sample import (
    ContentPart,
    LocatedSample,
    Sample,
    join_text,
)
from finesight.settings.manifest import (
    MAX_QUESTION_IMAGES,
    MAX_TEMPLATE_CHARS,
    QUESTION_MARK,
    PromptTemplate,
)

MAX_TEMPLATES = 3
"""Maximum number of recorded forms."""

MAX_PROMPTS = 4
"""Maximum number of recorded prompts."""

MIN_SHARE = 0.01
"""Minimum share of the questions with a recorded form or prompt."""

MAX_PROMPT_CHARS = 400
"""Maximum number of characters of a recorded prompt, and of the fixed texts of a template."""

MAX_READ_SAMPLES = 500
"""Maximum number of samples that are read to find the form of the questions."""


@dataclass(frozen=True, slots=True)
class Question:
    """First question of a sample.

    Attributes:
        prompt: Text with a mark for each image, and a character for each box or tool call.
        system_prompt: System prompt of the sample; None without one.
        weight: Weight of its data file in the training.
    """

    prompt: str
    system_prompt: str | None
    weight: float = field(default=1.0, compare=False)

    @property
    def has_images(self) -> bool:
        return count_marks(self.prompt) > 0

    @property
    def can_be_typed(self) -> bool:
        """Return whether the question has a text, but no boxes and tool calls."""
        return REGION not in self.prompt and remove_marks(self.prompt).strip() != ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts between the positions of images, some of which may be empty."""
        return tuple(split_at_marks(join_adjacent_marks(self.prompt)))

    @property
    def layout(self) -> tuple[bool, ...]:
        """Which of the texts are not empty."""
        return tuple(map(bool, self.texts))


def read_prompt_format(corpus: Corpus, indices: Sequence[int]) -> PromptFormat:
    """Find forms and frequent prompts of the questions of a corpus."""
    samples: list[LocatedSample] = []
    weights: list[float] = []
    for index, located in draw_samples(corpus, indices):
        samples.append(located)
        weights.append(corpus.get_weight(index))
    return find_prompt_format(samples, weights)


def draw_samples(corpus: Corpus, indices: Sequence[int]) -> Iterator[tuple[int, LocatedSample]]:
    """Yield the index and content of up to `MAX_READ_SAMPLES` valid samples of a corpus."""
    for number in draw_subset(len(indices), MAX_READ_SAMPLES):
        # Samples beyond a partial scan may be invalid.
        with suppress(UserError):
            yield indices[number], corpus.read_validated(indices[number])


def find_prompt_format(
    samples: Sequence[LocatedSample], weights: Sequence[float] | None = None
) -> PromptFormat:
    """Find forms and frequent prompts of the first questions of samples.

    Several answers to a question count once. A prompt of fewer than two or 1 % of the questions is
    left out, as are texts and system prompts that only one question has: they may be private, and
    manifests are published with models.

    Args:
        weights: Weight of each sample in the training; 1 by default.
    """
    questions: list[Question] = []
    seen = set()
    for located, weight in zip(samples, weights or [1.0] * len(samples), strict=True):
        content = find_question(located.sample)
        if content is None:
            continue
        media = tuple(part for part in content if isinstance(part, MediaPart))
        question = Question(write_marked_prompt(content), get_system_prompt(located.sample), weight)
        key = (question, located.folder, media)
        if key not in seen:
            seen.add(key)
            questions.append(question)
    return PromptFormat(_find_templates(questions), _find_prompts(questions))


def get_system_prompt(sample: Sample) -> str | None:
    """Return the system prompt of a sample; None without one."""
    first = sample.messages[0]
    return join_text(first.content) if first.role == "system" else None


def find_question(sample: Sample) -> Sequence[ContentPart] | None:
    """Return the first question with images, or else the first one; None without questions."""
    first = None
    for turn in sample.messages:
        if turn.role != "user":
            continue
        if any(isinstance(part, MediaPart) for part in turn.content):
            return turn.content
        if first is None:
            first = turn.content
    return first


def _find_prompts(questions: Iterable[Question]) -> tuple[str, ...]:
    """Return the frequent prompts, the most frequent first."""
    counts = Counter(question.prompt for question in questions if question.can_be_typed)
    least_count = max(2.0, MIN_SHARE * sum(counts.values()))
    prompts = []
    for prompt, count in counts.most_common():
        if count >= least_count and len(prompt) <= MAX_PROMPT_CHARS:
            prompts.append(prompt)
    return tuple(prompts[:MAX_PROMPTS])


def _find_templates(questions: Sequence[Question]) -> tuple[PromptTemplate, ...]:
    """Return the forms of questions, the most frequent first."""
    by_layout: dict[tuple[bool, ...], list[Question]] = {}
    totals = {True: 0.0, False: 0.0}
    for question in questions:
        by_layout.setdefault(question.layout, []).append(question)
        totals[question.has_images] += question.weight
    by_form: dict[tuple[str, bool], list[Question]] = {}
    for group in by_layout.values():
        writer = _choose_template_writer(group)
        for question in group:
            form = (writer.write(question), question.has_images)
            by_form.setdefault(form, []).append(question)
    found: list[tuple[float, PromptTemplate]] = []
    for (template, has_images), group in by_form.items():
        weight = sum(question.weight for question in group)
        share = weight / totals[has_images]
        if share >= MIN_SHARE:
            found.append((weight, _describe_form(template, group, share)))
    found.sort(key=lambda item: -item[0])
    return tuple(template for _, template in found[:MAX_TEMPLATES])


def _describe_form(template: str, questions: Sequence[Question], share: float) -> PromptTemplate:
    counts: list[int] = []
    system_prompts: set[str | None] = set()
    for question in questions:
        counts.append(min(count_marks(question.prompt), MAX_QUESTION_IMAGES))
        system_prompts.add(question.system_prompt)
    system_prompt = None
    if len(system_prompts) == 1 and len(questions) > 1:
        system_prompt = system_prompts.pop()
    if system_prompt is not None and len(system_prompt) > MAX_TEMPLATE_CHARS:
        system_prompt = None
    return PromptTemplate(
        template=template,
        min_images=min(counts),
        max_images=max(counts),
        system_prompt=system_prompt,
        share=share,
    )


@dataclass(frozen=True, slots=True)
class TemplateWriter:
    """Writes the templates of questions with the same order of text and images.

    Attributes:
        slot: Index of the text that is the question; None without texts.
        keeps_texts: Whether the other texts belong to the template, such as `Image 1:`.
        has_positions: Whether images are at the same positions in all questions. Otherwise, one
            question cannot be put into a template, which then has no marks.
    """

    slot: int | None
    keeps_texts: bool
    has_positions: bool

    def write(self, question: Question) -> str:
        """Write a question as a template."""
        if self.slot is None:
            return join_adjacent_marks(question.prompt) + QUESTION_MARK
        if not self.has_positions:
            return _mark_question(question.texts[self.slot])
        marks = [IMAGE_MARK * count for count in count_adjacent_marks(question.prompt)]
        if len(marks) == 1:
            marks = [IMAGE_MARK]  # for all images at this position
        template = ""
        for index, text in enumerate(question.texts):
            if index == self.slot:
                template += _mark_question(text)
            elif self.keeps_texts:
                template += text
            template += "".join(marks[index : index + 1])
        return template


def _choose_template_writer(questions: Sequence[Question]) -> TemplateWriter:
    """Choose the text that is the question: the one that differs, or that follows the images."""
    columns = [*zip(*(question.texts for question in questions), strict=True)]
    different: list[int] = []
    fixed_texts: dict[int, str] = {}
    for index, column in enumerate(columns):
        if len({*column}) > 1:
            different.append(index)
        elif column[0]:
            fixed_texts[index] = column[0]
    if not different and not fixed_texts:
        return TemplateWriter(None, keeps_texts=False, has_positions=True)
    has_one_position = len(columns) <= 2
    if different:
        slot = different[-1]
        keeps_texts = True
    else:
        # One prompt for all samples. Texts between several images, such as `Image 1:`, belong to
        # any question, and the other half of a sentence around one image does not.
        slot = len(columns) - 1
        if not fixed_texts.get(slot, "").strip():
            slot = max(fixed_texts, key=lambda index: len(fixed_texts[index]))
        keeps_texts = not has_one_position
    fixed_texts.pop(slot, None)
    kept = "".join(fixed_texts.values()) if keeps_texts else ""
    counts = {count_adjacent_marks(question.prompt) for question in questions}
    is_short = len(kept) <= MAX_PROMPT_CHARS
    has_reserved = any(mark in kept for mark in (IMAGE_MARK, QUESTION_MARK, REGION))
    has_positions = len(different) <= 1 and is_short and not has_reserved
    if not has_one_position and len(counts) > 1:
        has_positions = False
    if keeps_texts and len(questions) < 2:
        keeps_texts = False  # the texts of a single question may be private
    return TemplateWriter(slot, keeps_texts, has_positions)


def _mark_question(text: str) -> str:
    """Return the mark of a question with the white space around its text."""
    stripped = text.strip()
    if not stripped:
        return QUESTION_MARK
    before, _, after = text.partition(stripped)
    if len(before) + len(after) > MAX_PROMPT_CHARS:
        return QUESTION_MARK
    return before + QUESTION_MARK + after
